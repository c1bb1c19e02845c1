// Copies through TypeScript and through the whole stack, against the same copies in a process of Rust
// (kvferry-copy's example copies). A chunk is one of an 8B model: 32 layers, 8 KV heads of 128 bfloat16, 256 tokens in blocks of
// 16 that do not follow each other: 32 MiB in 1,024 pieces. Ours and the reference take turns within one run.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { availableParallelism } from "node:os";
import { monitorEventLoopDelay } from "node:perf_hooks";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { buildProgram, load, median } from "./rows.mjs";

const PAIRS = 51;
/** Operations before those that are timed: an engine's JavaScript has been compiled long ago. */
export const WARM_UP = 300;
export const CHUNK = 256;
export const BLOCK = 16;
export const BLOCKS = 256;
const LAYERS = 32;
export const BLOCK_BYTES = BLOCK * 8 * 128 * 2;
export const OBJECT = 2 * LAYERS * CHUNK * 8 * 128 * 2;
export const POOL = 512 * 2 ** 20;
const layout = {
	numBlocks: BLOCKS,
	blockSize: BLOCK,
	numKvHeads: 8,
	headSize: 128,
	dtype: "bfloat16",
};

/**
 * Milliseconds; the ratio is the reference's time to ours, so what part of its speed is left.
 *
 * @returns {Promise<import("./rows.mjs").Row[]>}
 */
export default async function copy() {
	const program = buildProgram("kvferry-copy", "--example", "copies");
	const rows = [];
	for (const chunks of [1, 4]) {
		rows.push(...(await compare(program, chunks)));
	}
	rows.push(await pause());
	return rows;
}

/** Each layer's array. @template T @param {() => T} make @returns {Record<string, T>} */
export function arrays(make) {
	const layers = Array.from({ length: LAYERS }, (_, layer) => `layer.${layer}`);
	return Object.fromEntries(layers.map((layer) => [layer, make()]));
}

function serve() {
	const program = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));
	const ports = ["--port", "0", "--http-port", "off"];
	const args = ["serve", ...ports, "--memory", String(POOL), "--chunk-size", String(CHUNK)];
	const stdio = /** @type {["ignore", "pipe", "inherit"]} */ (["ignore", "pipe", "inherit"]);
	const child = spawn(process.execPath, [program, ...args], { stdio });
	const kill = () => child.kill();
	process.once("exit", kill); // whatever ends us
	child.once("exit", () => process.off("exit", kill));
	return child;
}

async function urlOf(/** @type {ReturnType<typeof serve> | undefined} */ child) {
	const input = /** @type {NodeJS.ReadableStream} */ (child?.stdout);
	const [line] = await once(createInterface({ input }), "line");
	return /** @type {string} */ (/tcp:\S+/.exec(line)?.[0]);
}

/** An engine before a server of its own process. */
export class Stack {
	#requests = 0;

	/**
	 * @param {"never" | "always"} verify
	 * @param {{ kvferry?: typeof import("../../ts/index.js"), kv?: any, place?: any }} [engine] Whose KV memory is not the host's, or another's.
	 * @param {string} [url] Of a server that runs already; what its pool has is its own matter.
	 */
	static async open(verify, engine, url) {
		const kvferry = engine?.kvferry ?? (await load());
		const child = url === undefined ? serve() : undefined;
		const client = await kvferry.Client.connect({ url: url ?? (await urlOf(child)) });
		const kv =
			engine?.kv ?? arrays(() => new Uint32Array(new SharedArrayBuffer(2 * BLOCKS * BLOCK_BYTES)));
		const options = {
			via: client,
			modelName: "bench",
			timeoutMs: 5000,
			saveTimeoutMs: 5000,
			verify,
		};
		const adapter = kvferry.createWorkerAdapter(options);
		await adapter.registerKvCaches(kv, { ...layout, ...engine?.place });
		while (child !== undefined && Number((await client.status()).reserved_bytes) < POOL) {
			await new Promise((resolve) => setTimeout(resolve, 20)); // the pool grows in the background
		}
		return new Stack(child, client, kv, kvferry.createSchedulerAdapter(options), adapter);
	}

	/**
	 * @param {import("node:child_process").ChildProcess | undefined} child
	 * @param {import("../../ts/index.js").Client} client
	 * @param {Record<string, Uint32Array>} kv
	 * @param {import("../../ts/index.js").CacheSchedulerAdapter} scheduler
	 * @param {import("../../ts/index.js").CacheWorkerAdapter} adapter
	 */
	constructor(child, client, kv, scheduler, adapter) {
		this.child = child;
		this.client = client;
		this.kv = kv;
		this.scheduler = scheduler;
		this.adapter = adapter;
	}

	/**
	 * An operation on some chunks of a prompt of its own, in blocks that do not follow each other, and that no operation
	 * had for as long as there are others.
	 */
	op(
		/** @type {number} */ chunks,
		prompt = ++this.#requests,
		first = (prompt * chunks * CHUNK) / BLOCK,
	) {
		const end = chunks * CHUNK;
		const tokenIds = Uint32Array.from({ length: end }, (_, at) => prompt * 100_000 + at);
		const blocks = Array.from({ length: end / BLOCK }, (_, n) => ((first + n) * 97) % BLOCKS);
		const op = { tokenIds, start: 0, end, blockIds: [blocks], skipFirstNTokens: 0 };
		return { prompt, first, op };
	}

	/** One on the same tokens, in none of its blocks. */
	elsewhere(/** @type {ReturnType<Stack["op"]>} */ { prompt, first, op }) {
		return this.op(op.end / CHUNK, prompt, first + BLOCKS / 2);
	}

	/** Stores, from its submission to its end. */
	async store(/** @type {ReturnType<Stack["op"]>} */ { prompt, op }) {
		const { adapter } = this;
		const before = adapter.storedChunks;
		const start = performance.now();
		adapter.batchedSubmitStoreRequests([String(prompt)], [op]);
		await this.ended(String(prompt));
		const ms = performance.now() - start;
		if (adapter.storedChunks - before !== op.end / CHUNK) {
			throw new Error(`not stored: ${adapter.failure?.message}`);
		}
		return ms;
	}

	/** Loads what was looked up before, from its submission to its end. */
	async load(/** @type {ReturnType<Stack["op"]>} */ { prompt, op }) {
		const requestId = `load ${prompt}`;
		this.scheduler.maybeSubmitLookupRequest(requestId, op.tokenIds);
		let found = null;
		while (found === null) {
			await new Promise((resolve) => setImmediate(resolve));
			found = this.scheduler.checkLookupResult(requestId);
		}
		if (found !== op.end) {
			throw new Error(`${found} of ${op.end} tokens found: ${this.scheduler.failure?.message}`);
		}
		const start = performance.now();
		this.adapter.batchedSubmitRetrieveRequests([requestId], [op]);
		await this.adapter.waitForLoads();
		const ms = performance.now() - start;
		if (this.adapter.getBlockIdsWithLoadErrors().size > 0) {
			throw new Error(`not loaded: ${this.adapter.failure?.message}`);
		}
		this.adapter.getFinished(new Set());
		this.scheduler.endSession(requestId);
		return ms;
	}

	async ended(/** @type {string} */ requestId) {
		await this.adapter.flush(); // polling meanwhile would take a core from the copies and the server
		this.adapter.getFinished(new Set([requestId]));
	}

	/** Fills an operation's blocks, and tells whether they hold it. */
	fill(/** @type {ReturnType<Stack["op"]>} */ { prompt, op }, check = false) {
		const words = BLOCK_BYTES / 4;
		return Object.values(this.kv).every((kv, layer) =>
			[0, 1].every((plane) =>
				(op.blockIds[0] ?? []).every((block, n) => {
					const at = (plane * BLOCKS + block) * words;
					const value = prompt * 1_000_000 + layer * 10_000 + plane * 5000 + n;
					const part = kv.subarray(at, at + words);
					return check ? part.every((word) => word === value) : part.fill(value);
				}),
			),
		);
	}

	async close() {
		await this.adapter.shutdown();
		await this.client.close();
		if (this.child !== undefined) {
			this.child.kill();
			await once(this.child, "exit");
		}
	}
}

/** Only what a submission to the copy threads takes, from JavaScript to JavaScript. */
async function submission(/** @type {Stack} */ stack, /** @type {number} */ chunks) {
	const place = { modelName: "bench", kvWorldSize: 1, numKvReaders: 1 };
	const native = { ...layout, numLayers: LAYERS, planes: "separate", order: "NHD" };
	const worker = await stack.client.openWorker(place, 0, native, 5000);
	const views = Object.values(stack.kv).flatMap(({ buffer }) => [
		new Uint8Array(buffer, 0, BLOCKS * BLOCK_BYTES),
		new Uint8Array(buffer, BLOCKS * BLOCK_BYTES),
	]);
	worker.registerShared(views);
	return {
		close: () => worker.close(5000),
		run: async () => {
			const { prompt, op } = stack.op(chunks);
			const range = { requestId: `${prompt}`, start: 0, end: op.end, cacheSalt: "" };
			const store = await worker.store(op.tokenIds, range, 5000);
			const blocks = Uint32Array.from(op.blockIds[0] ?? []);
			const start = performance.now();
			worker.planStore(store, blocks, false);
			worker.startOut(store);
			await store.copied();
			const ms = performance.now() - start;
			await worker.abandon(store, 5000);
			return ms;
		},
	};
}

/** The same copies with no boundary to cross: milliseconds of a gather or a scatter. */
export function plainCopies(/** @type {string} */ program, /** @type {number} */ chunks) {
	const child = spawn(program, [String(chunks)], { stdio: ["pipe", "pipe", "inherit"] });
	const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
	return {
		run: async (/** @type {"gather" | "scatter"} */ direction) => {
			child.stdin.write(`${direction}\n`);
			return Number((await lines.next()).value) / 1e6;
		},
		close: async () => {
			child.stdin.end();
			await once(child, "close");
		},
	};
}

async function compare(/** @type {string} */ program, /** @type {number} */ chunks) {
	const plain = plainCopies(program, chunks);
	const size = `${(chunks * OBJECT) / 2 ** 20} MiB`;
	const rows = [];
	for (const verify of /** @type {const} */ (["never", "always"])) {
		const stack = await Stack.open(verify);
		const submitted = await submission(stack, chunks);
		// What is loaded is what was stored; and the whole pool is touched and mapped by then.
		for (let round = 0; round < POOL / OBJECT / chunks + 2; round++) {
			const operation = stack.op(chunks);
			stack.fill(operation);
			await stack.store(operation);
			const other = stack.elsewhere(operation);
			await stack.load(other);
			if (!stack.fill(other, true)) {
				throw new Error("what was loaded is not what was stored, so times mean nothing");
			}
			await submitted.run();
			await plain.run("gather");
		}
		for (let round = 0; round < WARM_UP; round++) {
			const operation = stack.op(chunks);
			await stack.store(operation);
			await stack.load(stack.elsewhere(operation));
		}
		/** @type {Record<"submit" | "store" | "load" | "gather", number[]>} */
		const ms = { submit: [], store: [], load: [], gather: [] };
		for (let pair = 0; pair < PAIRS; pair++) {
			const operation = stack.op(chunks);
			ms.gather.push(await plain.run("gather"));
			ms.store.push(await stack.store(operation));
			ms.load.push(await stack.load(stack.elsewhere(operation)));
			ms.submit.push(await submitted.run());
		}
		for (const what of /** @type {const} */ (["submit", "store", "load"])) {
			const name =
				what === "submit"
					? `${size}: gather submitted from TypeScript to its end ÷ in Rust`
					: `${size}: ${what} through server and client, verify "${verify}" ÷ the gather in Rust`;
			if (what !== "submit" || verify === "never") {
				const ratio = median(
					ms[what].map((ours, n) => /** @type {number} */ (ms.gather[n]) / ours),
				);
				rows.push({
					name,
					ours: median(ms[what]),
					reference: median(ms.gather),
					unit: "ms",
					ratio,
				});
			}
		}
		await submitted.close();
		await stack.close();
	}
	await plain.close();
	return rows;
}

/** The event loop's longest pause while 1 GiB is stored and loaded, with a copy thread less than there are cores. */
async function pause() {
	const threads = Math.max(1, availableParallelism() - 1);
	const script = `import(${JSON.stringify(import.meta.url)}).then(({ pauses }) => pauses())`;
	const child = spawn(process.execPath, ["-e", script], {
		env: { ...process.env, KVFERRY_COPY_THREADS: String(threads) },
		stdio: ["ignore", "pipe", "inherit"],
	});
	const [line] = await once(createInterface({ input: child.stdout }), "line");
	const ours = Number(line);
	const name = `longest pause of the event loop in 1 GiB of copies, ${threads} copy thread(s); limit 5 ms`;
	return { name, ours, reference: 5, unit: "ms", ratio: ours / 5 };
}

/** Prints the median of the longest pauses of some runs. */
export async function pauses() {
	const stack = await Stack.open("never");
	const longest = [];
	for (let run = 0; run < 6; run++) {
		const delay = monitorEventLoopDelay({ resolution: 1 });
		delay.enable();
		for (let gigabyte = 0; gigabyte < 2 ** 30 / OBJECT / 2 / 4; gigabyte++) {
			const operation = stack.op(4);
			await stack.store(operation);
			await stack.load(stack.elsewhere(operation));
		}
		delay.disable();
		longest.push(delay.max / 1e6 - 1); // the timer's own millisecond
	}
	console.log(median(longest.slice(1))); // the first run maps the pool
	await stack.close();
}
