// The real programs, each in a process of its own.

import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { installLmcache, installVllm } from "../../scripts/peers.mjs";
import { cache } from "../../scripts/setup.mjs";
import { freePort } from "../connector/token-engine.js";

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
export class LmcacheServer implements AsyncDisposable {
	/** What an operator has to add, that clients may map its memory. */
	static readonly SHARED = [
		...["--supported-transfer-mode", "engine_driven"],
		...["--no-l1-use-lazy", "--shm-name", `kvferry_peers_${process.pid}`],
	];

	private constructor(
		readonly process: ChildProcess,
		readonly port: number,
	) {}

	/** Starts one and waits until it listens. */
	static async start(options: string[] = LmcacheServer.SHARED, port?: number) {
		const chosen = port ?? (await freePort());
		const address = ["--host", "127.0.0.1", "--port", String(chosen)];
		const sizes = ["--l1-size-gb", "1", "--eviction-policy", "LRU", "--disable-metrics"];
		const args = ["-m", "lmcache.v1.multiprocess.server", ...address, ...sizes, ...options];
		const child = spawn(installLmcache(), args, { env, stdio: ["ignore", "ignore", "pipe"] });
		let errors = "";
		child.stderr.setEncoding("utf8").on("data", (text: string) => {
			errors = (errors + text).slice(-4000);
		});
		for (const until = Date.now() + START_MS; !(await listens(chosen)); await sleep(200)) {
			if (child.exitCode !== null || Date.now() > until) {
				child.kill("SIGKILL");
				throw new Error(`LMCache's server does not listen: ${errors}`);
			}
		}
		return new LmcacheServer(child, chosen);
	}

	get url(): string {
		return `tcp://127.0.0.1:${this.port}`;
	}

	async end(signal: NodeJS.Signals): Promise<void> {
		if (this.process.exitCode === null && this.process.signalCode === null) {
			const exited = once(this.process, "exit");
			this.process.kill(signal);
			await exited;
		}
	}

	[Symbol.asyncDispose](): Promise<void> {
		return this.end("SIGTERM");
	}
}

async function listens(port: number): Promise<boolean> {
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

/** What a vLLM engine is asked. */
export interface Asked {
	/** Of the prompt. */
	readonly tokens: number;
	/** Which prompt: two of different seeds share no prefix. */
	readonly seed: number;
	/** Tokens at the prompt's end that are another's. */
	readonly tail?: number;
	/** Tokens to generate, the likeliest ones. Default 1. */
	readonly generate?: number;
	readonly salt?: string;
	/** Whether the engine forgets what its own cache has before. */
	readonly reset?: boolean;
}

export interface Answered {
	readonly seconds: number;
	/** Of the prompt's tokens, not evaluated. */
	readonly cached: number;
	readonly tokens: number[];
}

/** An engine of vLLM with LMCache's connector. */
export class VllmEngine implements AsyncDisposable {
	readonly #child: ChildProcess;
	readonly #lines: AsyncIterator<string>;
	readonly log: string[] = [];

	private constructor(args: string[]) {
		const script = fileURLToPath(new URL("vllm_engine.py", import.meta.url));
		this.#child = spawn(installVllm(), [script, ...args], { env, stdio: "pipe" });
		for (const stream of [this.#child.stdout, this.#child.stderr]) {
			createInterface({ input: stream as NodeJS.ReadableStream }).on("line", (line) => {
				if (!line.startsWith("RESULT ")) {
					this.log.push(line);
				}
			});
		}
		const input = this.#child.stdout as NodeJS.ReadableStream;
		this.#lines = createInterface({ input })[Symbol.asyncIterator]();
	}

	/** Starts one; port 0: without the connector. */
	static async start(port: number | string, ...settings: string[]): Promise<VllmEngine> {
		const engine = new VllmEngine([await randomModel(), String(port), ...settings]);
		await engine.#answer();
		return engine;
	}

	async #answer(): Promise<Answered> {
		for (;;) {
			const { value, done } = await this.#lines.next();
			if (done) {
				throw new Error(`vLLM has ended:\n${this.log.slice(-30).join("\n")}`);
			}
			if (value.startsWith("RESULT ")) {
				return JSON.parse(value.slice("RESULT ".length));
			}
		}
	}

	/** One request, to its last token. */
	async ask(asked: Asked): Promise<Answered> {
		this.#child.stdin?.write(`${JSON.stringify(asked)}\n`);
		return await this.#answer();
	}

	async [Symbol.asyncDispose](): Promise<void> {
		if (this.#child.exitCode === null) {
			const exited = once(this.#child, "exit");
			this.#child.stdin?.end();
			await exited;
		}
	}
}

/** A model's directory, made once and kept. */
export async function randomModel(): Promise<string> {
	const model = join(cache, "models", "random-llama-213m");
	if (!existsSync(model)) {
		const script = fileURLToPath(new URL("random_model.py", import.meta.url));
		await promisify(execFile)(installVllm(), [script, model]);
	}
	return model;
}

/** Runs `lmcache …` and gives what it prints; fails as it does. */
export async function lmcache(...args: string[]): Promise<string> {
	const program = "import sys; from lmcache.cli.main import main; sys.exit(main())";
	const options = { env, maxBuffer: 1 << 26, timeout: START_MS };
	const run = promisify(execFile)(installLmcache(), ["-c", program, ...args], options);
	const { stdout, stderr } = await run;
	return stdout + stderr;
}
