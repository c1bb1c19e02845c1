// The real programs, each in a process of its own. The benchmark beside them uses these, too: plain JavaScript.

import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { connect, createServer } from "node:net";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { installLmcache, installVllm } from "../../scripts/peers.mjs";
import { cache } from "../../scripts/setup.mjs";

/** The first start reads gigabytes from the disk. */
const START_MS = 240_000;
const env = {
	...process.env,
	LMCACHE_TRACK_USAGE: "false",
	LMCACHE_LOG_LEVEL: "WARNING",
	VLLM_NO_USAGE_STATS: "1",
	VLLM_LOGGING_LEVEL: "ERROR",
	VLLM_CPU_KVCACHE_SPACE: "1",
};

/** LMCache's server, without its HTTP. */
export class LmcacheServer {
	/** What an operator has to add, that clients may map its memory. */
	static SHARED = LmcacheServer.shared(`kvferry_peers_${process.pid}`);

	/** The same by another name of its memory: each server that runs at the same time needs one. */
	static shared(/** @type {string} */ name) {
		return [
			...["--supported-transfer-mode", "engine_driven"],
			...["--no-l1-use-lazy", "--shm-name", name],
		];
	}

	/**
	 * Starts one and waits until it listens.
	 *
	 * @param {string[]} options
	 * @param {number} [port]
	 * @param {boolean} metrics Whether it keeps and serves them, as it does by default: at port 9090.
	 */
	static async start(options = LmcacheServer.SHARED, port, metrics = false) {
		const chosen = port ?? (await freePort());
		const address = ["--host", "127.0.0.1", "--port", String(chosen)];
		const sizes = ["--l1-size-gb", "1", "--eviction-policy", "LRU"];
		const counted = metrics ? [] : ["--disable-metrics"];
		const settings = [...address, ...sizes, ...counted, ...options];
		const args = ["-m", "lmcache.v1.multiprocess.server", ...settings];
		const child = spawn(installLmcache(), args, { env, stdio: ["ignore", "ignore", "pipe"] });
		let errors = "";
		child.stderr.setEncoding("utf8").on("data", (/** @type {string} */ text) => {
			errors = (errors + text).slice(-4000);
		});
		for (const until = Date.now() + START_MS; !(await listens(chosen)); await sleep(50)) {
			if (child.exitCode !== null || Date.now() > until) {
				child.kill("SIGKILL");
				throw new Error(`LMCache's server does not listen: ${errors}`);
			}
		}
		return new LmcacheServer(child, chosen);
	}

	/**
	 * @private
	 * @param {import("node:child_process").ChildProcess} child
	 * @param {number} port
	 */
	constructor(child, port) {
		this.process = child;
		this.port = port;
	}

	get url() {
		return `tcp://127.0.0.1:${this.port}`;
	}

	/** @param {NodeJS.Signals} signal */
	async end(signal) {
		if (this.process.exitCode === null && this.process.signalCode === null) {
			const exited = once(this.process, "exit");
			this.process.kill(signal);
			await exited;
		}
	}

	/** @returns {Promise<void>} */
	[Symbol.asyncDispose]() {
		return this.end("SIGTERM");
	}
}

/** A port that nobody listens on. */
async function freePort() {
	const probe = createServer().listen(0, "127.0.0.1");
	await once(probe, "listening");
	const { port } = /** @type {import("node:net").AddressInfo} */ (probe.address());
	probe.close();
	await once(probe, "close");
	return port;
}

async function listens(/** @type {number} */ port) {
	const socket = connect(port, "127.0.0.1");
	try {
		await once(socket, "connect");
		return true;
	} catch {
		return false;
	} finally {
		socket.destroy();
	}
}

/**
 * What a vLLM engine is asked.
 *
 * @typedef {object} Asked
 * @property {number} tokens Of the prompt.
 * @property {number} seed Which prompt: two of different seeds share no prefix.
 * @property {number} [tail] Tokens at the prompt's end that are another's.
 * @property {number} [generate] Tokens to generate, the likeliest ones. Default 1.
 * @property {string} [salt]
 * @property {boolean} [reset] Whether the engine forgets what its own cache has before.
 */

/**
 * @typedef {object} Answered
 * @property {number} seconds
 * @property {number} cached Of the prompt's tokens, not evaluated.
 * @property {number[]} tokens
 */

/** A program of Python in this directory, whose answers are lines that begin with "RESULT ". */
class Program {
	#child;
	#lines;
	/** @type {string[]} */
	log = [];

	/**
	 * @param {string} python
	 * @param {string} name
	 * @param {string[]} args
	 */
	constructor(python, name, args) {
		const script = fileURLToPath(new URL(name, import.meta.url));
		const child = spawn(python, [script, ...args], { env, stdio: "pipe" });
		for (const stream of [child.stdout, child.stderr]) {
			createInterface({ input: stream }).on("line", (line) => {
				if (!line.startsWith("RESULT ")) {
					this.log.push(line);
				}
			});
		}
		this.#child = child;
		this.#lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
	}

	/** The next answer. @returns {Promise<any>} */
	async answer() {
		for (;;) {
			const { value, done } = await this.#lines.next();
			if (done) {
				const [, script] = this.#child.spawnargs;
				throw new Error(`${script} has ended:\n${this.log.slice(-30).join("\n")}`);
			}
			if (value.startsWith("RESULT ")) {
				return JSON.parse(value.slice("RESULT ".length));
			}
		}
	}

	/** @param {object} question */
	tell(question) {
		this.#child.stdin.write(`${JSON.stringify(question)}\n`);
	}

	/** Ends its input: it ends what it does, and then itself. */
	end() {
		this.#child.stdin.end();
	}

	/** @returns {Promise<void>} */
	async [Symbol.asyncDispose]() {
		if (this.#child.exitCode === null) {
			const exited = once(this.#child, "exit");
			this.end();
			await exited;
		}
	}
}

/** An engine of vLLM with LMCache's connector. */
export class VllmEngine extends Program {
	/**
	 * Starts one; port 0: without the connector.
	 *
	 * @param {number | string} port
	 * @param {string[]} settings
	 */
	static async start(port, ...settings) {
		const args = [await randomModel(), String(port), ...settings];
		const engine = new VllmEngine(installVllm(), "vllm_engine.py", args);
		await engine.answer();
		return engine;
	}

	/**
	 * One request, to its last token.
	 *
	 * @param {Asked} asked
	 * @returns {Promise<Answered>}
	 */
	async ask(asked) {
		this.tell(asked);
		return await this.answer();
	}
}

/**
 * A batch of a stream of events, hashes in hexadecimal.
 *
 * @typedef {object} Batch
 * @property {boolean} enabled
 * @property {boolean} lost
 * @property {{ kind: string, hashes: string[], parent: string | null, tokens: number[] }[]} events
 */

/** LMCache's client, listening to a model's events. */
export class LmcacheListener extends Program {
	/** @param {string} url @param {string} model */
	constructor(url, model) {
		super(installLmcache(), "lmcache_listener.py", [url, model]);
	}

	/** @returns {Promise<Batch>} */
	batch() {
		return this.answer();
	}
}

/** A model's directory, made once and kept. */
async function randomModel() {
	const model = join(cache, "models", "random-llama-213m");
	if (!existsSync(model)) {
		const script = fileURLToPath(new URL("random_model.py", import.meta.url));
		await promisify(execFile)(installVllm(), [script, model]);
	}
	return model;
}

/**
 * What LMCache's own client gets back of what it stored, byte by byte, when the server copies from and to its memory:
 * lmcache_driven.py, which fails where that is not what it stored.
 *
 * @param {string} url
 * @param {"cpu" | "gpu"} mode
 * @param {string[]} args
 * @returns {Promise<{ chunks: number, chunk_bytes: number, store_gbps: number, load_gbps: number }>}
 */
export async function lmcacheDriven(url, mode, ...args) {
	const script = fileURLToPath(new URL("lmcache_driven.py", import.meta.url));
	const options = { env, maxBuffer: 1 << 26, timeout: START_MS };
	const run = await promisify(execFile)(installLmcache(), [script, url, mode, ...args], options);
	return JSON.parse(run.stdout);
}

/** Whether LMCache's torch finds a GPU. */
export async function hasGpu() {
	const program = "import torch; print(torch.cuda.is_available())";
	const { stdout } = await promisify(execFile)(installLmcache(), ["-c", program], { env });
	return stdout.trim() === "True";
}

/**
 * Runs `lmcache …` and gives what it prints; fails as it does.
 *
 * @param {string[]} args
 */
export async function lmcache(...args) {
	const program = "import sys; from lmcache.cli.main import main; sys.exit(main())";
	const options = { env, maxBuffer: 1 << 26, timeout: START_MS };
	const run = promisify(execFile)(installLmcache(), ["-c", program, ...args], options);
	const { stdout, stderr } = await run;
	return stdout + stderr;
}
