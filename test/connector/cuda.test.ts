// KV memory of a GPU, by the fake driver: engines in processes of their own, and a server in another one.

import { type ChildProcess, fork, spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface, type Interface } from "node:readline";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { fakeCudaRoot } from "../../scripts/fake-cuda.mjs";
import { root } from "../../scripts/setup.mjs";
import { simulatorRoot } from "../../scripts/simulator-build.mjs";
import {
	Client,
	createSchedulerAdapter,
	createWorkerAdapter,
	type KvCacheLayout,
	type KvIpcHandle,
	type LayerKv,
	WorkerConnector,
} from "../../ts/index.js";
import { ServerProcess } from "../server-process.js";
import { range, run, sent, TOKENS } from "./paged-engine.js";

const ENGINE = fileURLToPath(new URL("cuda-engine.mjs", import.meta.url));
const EXPORTER = fileURLToPath(new URL("gpu_exporter.py", import.meta.url));
const PYTHON = fileURLToPath(new URL("../../.cache/venv/bin/python", import.meta.url));
/** The simulator's engine keeps its stream and its context to its end; nothing else may be left. */
const ENGINES_OWN =
	"0 violations; alive: 1 streams, 0 events, 0 allocations, 0 pinned ranges, 0 modules, 1 contexts";

const LAYERS = 4;
const FROM = [3, 4, 5, 9, 0, 1, 15, 14, 13, 2, 7, 8];
const TO = [8, 1, 2, 3, 12, 11, 10, 9, 4, 5, 6, 7];
const SIZES = { numBlocks: 16, blockSize: 4, numKvHeads: 3, headSize: 5, dtype: "float16" };
const SHAPES = [
	{ ...SIZES, planes: "separate", kvLayout: "NHD" },
	{ ...SIZES, planes: "fused", kvLayout: "HND" },
	{ ...SIZES, planes: "latent", numKvHeads: 1 },
] as const satisfies KvCacheLayout[];
const names = range(0, LAYERS).map((layer) => `layer.${layer}`);

/** How long is waited for what a server or a process will do. */
const LONG = { timeout: 10_000 };

const open: AsyncDisposable[] = [];

beforeEach(({ skip }) => skip(process.platform !== "linux", "the fake driver is for Linux"));

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

function use<T extends AsyncDisposable>(handle: T): T {
	open.push(handle);
	return handle;
}

function environment(settings: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
	return { ...process.env, LD_LIBRARY_PATH: fakeCudaRoot, FAKECUDA_STRICT: "1", ...settings };
}

/** A process, and what it said to stderr. */
class Child implements AsyncDisposable {
	errors = "";
	/** Its exit code, or the signal that ended it, and what the fake driver said at its end. */
	readonly ended: Promise<{ code: number | NodeJS.Signals | null; account: string | undefined }>;

	constructor(readonly process: ChildProcess) {
		process.stderr?.setEncoding("utf8").on("data", (text: string) => {
			this.errors += text;
		});
		this.ended = once(process, "close").then(([code, signal]) => ({
			code: code ?? signal,
			account: /^\[fake-cuda\] at exit: (.*)$/m.exec(this.errors)?.[1],
		}));
	}

	/** An answer, unless the process ends before. */
	protected async answer<T>(waiting: Promise<T>): Promise<T> {
		const ended = this.ended.then(({ code }) => {
			throw new Error(`the process ended with ${code}: ${this.errors}`);
		});
		return await Promise.race([waiting, ended]);
	}

	async [Symbol.asyncDispose](): Promise<void> {
		this.process.kill("SIGKILL");
		await this.ended;
	}
}

/** An engine, see `cuda-engine.mjs`. */
class Engine extends Child {
	static async start(
		home: string,
		{ url }: ServerProcess,
		settings: NodeJS.ProcessEnv = {},
	): Promise<Engine> {
		const child = fork(ENGINE, [home, url], {
			env: environment(settings),
			stdio: ["ignore", "inherit", "pipe", "ipc"],
			serialization: "advanced",
		});
		const engine = use(new Engine(child));
		await engine.answer(once(child, "message"));
		return engine;
	}

	async ask(what: string, ...given: unknown[]): Promise<unknown> {
		const answered = once(this.process, "message");
		this.tell(what, ...given);
		const [{ result, error }] = await this.answer(answered);
		if (error !== undefined) {
			throw Object.assign(new Error(error.message), { code: error.code });
		}
		return result;
	}

	tell(...message: unknown[]): void {
		this.process.send(message);
	}

	/** Ends it as a process ends that has nothing more to do. */
	async end(): Promise<void> {
		this.tell("end");
		await this.ended;
	}
}

/** Another engine, with memory that it exports, see `gpu_exporter.py`. */
class Exporter extends Child {
	readonly #lines: Interface;
	handle = new Uint8Array();

	private constructor(child: ChildProcess) {
		super(child);
		this.#lines = createInterface({ input: child.stdout as NodeJS.ReadableStream });
	}

	static async start(bytes: number): Promise<Exporter> {
		const child = spawn(PYTHON, [EXPORTER, String(bytes)], { env: environment({}) });
		const exporter = use(new Exporter(child));
		const [line] = await exporter.answer(once(exporter.#lines, "line"));
		exporter.handle = Uint8Array.from(Buffer.from(line, "base64"));
		return exporter;
	}

	async #ask(line: string): Promise<string> {
		const answered = once(this.#lines, "line");
		this.process.stdin?.write(`${line}\n`);
		return (await this.answer(answered))[0];
	}

	async write(bytes: Uint8Array): Promise<void> {
		await this.#ask(`write ${Buffer.from(bytes).toString("base64")}`);
	}

	async read(): Promise<Uint8Array> {
		return Uint8Array.from(Buffer.from(await this.#ask("read"), "base64"));
	}

	/** Frees the memory, which nobody may have open, and ends. */
	async end(): Promise<void> {
		this.process.stdin?.end();
		expect(await this.ended).toEqual({ code: 0, account: undefined });
	}
}

/** Bytes of a layer, of one of its arrays, and of a block there, spelt out from the layout. */
function sizes(layout: KvCacheLayout) {
	const { numBlocks, blockSize = 16, numKvHeads, headSize, planes } = layout;
	const rows = numBlocks * blockSize * numKvHeads;
	const layer = rows * headSize * 2 * (planes === "latent" ? 1 : 2);
	const array = planes === "separate" ? layer / 2 : layer;
	return { layer, array, block: array / numBlocks };
}

/** Bytes of a layer that are not those of another layer, or of another seed. */
function content(bytes: number, seed: number, layer: number): Uint8Array {
	const mask = (seed * 17 + layer * 5) & 0xff;
	return Uint8Array.from(
		{ length: bytes },
		(_, at) => (Math.imul(at + 1, 0x9e3779b1) >>> 24) ^ mask,
	);
}

/** A layer that was spoilt after some of its blocks were stored, once these are loaded to others. */
function loaded(layout: KvCacheLayout, stored: Uint8Array, spoilt: Uint8Array): Uint8Array {
	const { layer, array, block } = sizes(layout);
	const expected = spoilt.slice();
	for (let base = 0; base < layer; base += array) {
		for (const [i, to] of TO.entries()) {
			const from = base + (FROM[i] as number) * block;
			expected.set(stored.subarray(from, from + block), base + to * block);
		}
	}
	return expected;
}

async function within<T>(ms: number, waiting: Promise<T>): Promise<T> {
	let timer: NodeJS.Timeout | undefined;
	const late = new Promise<never>((_, reject) => {
		timer = setTimeout(() => reject(new Error(`it has not ended after ${ms} ms`)), ms);
	});
	try {
		return await Promise.race([waiting, late]);
	} finally {
		clearTimeout(timer);
	}
}

async function lookUp(via: Client, tokens: readonly number[]): Promise<number> {
	const adapter = createSchedulerAdapter({ via, modelName: "m" });
	adapter.maybeSubmitLookupRequest("RETRIEVE", tokens);
	let found = adapter.checkLookupResult("RETRIEVE");
	while (found === null) {
		await new Promise((resolve) => setImmediate(resolve));
		found = adapter.checkLookupResult("RETRIEVE");
	}
	return found;
}

async function serve(chunkSize: number): Promise<{ server: ServerProcess; client: Client }> {
	const server = use(await ServerProcess.start("--chunk-size", String(chunkSize)));
	return { server, client: use(await Client.connect({ url: server.url })) };
}

describe("a GPU's memory", () => {
	for (const layout of SHAPES) {
		it(`is stored and loaded through a server of its own (${layout.planes})`, async () => {
			const { server, client } = await serve(16);
			const engine = await Engine.start(simulatorRoot, server, { FAKECUDA_STRICT: "0" });
			const stream = await engine.ask("stream");
			const byteLength = sizes(layout).layer;
			const memory: { name: string; pointer: bigint; stored: Uint8Array; spoilt: Uint8Array }[] =
				[];
			for (const [layer, name] of names.entries()) {
				const pointer = (await engine.ask("allocate", byteLength)) as bigint;
				const stored = content(byteLength, 1, layer);
				const spoilt = content(byteLength, 2, layer);
				await engine.ask("write", pointer, stored);
				memory.push({ name, pointer, stored, spoilt });
			}
			const caches = memory.map(({ name, pointer }) => [name, { pointer, byteLength }] as const);
			await engine.ask("register", Object.fromEntries(caches), {
				...layout,
				device: "cuda",
				stream,
			});
			const then = memory.map(({ pointer, spoilt }) => [pointer, spoilt]);
			expect(await engine.ask("store", FROM, TOKENS, then)).toEqual({ stored: 3 });
			expect(await lookUp(client, TOKENS)).toBe(TOKENS.length);
			const expected = memory.map(({ stored, spoilt }) => loaded(layout, stored, spoilt));
			const load = await engine.ask("load", TO, TOKENS, caches);
			expect(load).toEqual({ there: expected, wrong: [] });
			await engine.ask("shutdown");
			for (const [layer, { pointer }] of memory.entries()) {
				expect(await engine.ask("read", { pointer, byteLength })).toEqual(expected[layer]);
				await engine.ask("free", pointer);
			}
			expect(await engine.ask("violations")).toBe(0);
			await engine.end();
			expect(await engine.ended).toEqual({ code: 0, account: ENGINES_OWN });
		});
	}

	it("that another process has is stored and loaded by its handle", async () => {
		const [layout] = SHAPES;
		const byteLength = sizes(layout).layer;
		const { server, client } = await serve(16);
		const exporter = await Exporter.start(LAYERS * byteLength);
		const importer = await Engine.start(root, server);
		const stored = content(LAYERS * byteLength, 1, 0);
		const spoilt = content(LAYERS * byteLength, 2, 0);
		await exporter.write(stored);
		await importer.ask("register", byHandle(exporter.handle, byteLength), gpu(layout));
		expect(await importer.ask("store", FROM, TOKENS)).toEqual({ stored: 3 });
		await exporter.write(spoilt);
		expect(await lookUp(client, TOKENS)).toBe(TOKENS.length);
		const layers = names.map((name) => [name]);
		expect(await importer.ask("load", TO, TOKENS, layers)).toMatchObject({ wrong: [] });
		const expected = names.map((_, layer) => {
			const part = (bytes: Uint8Array) =>
				bytes.subarray(layer * byteLength).subarray(0, byteLength);
			return loaded(layout, part(stored), part(spoilt));
		});
		expect(Buffer.compare(await exporter.read(), Buffer.concat(expected))).toBe(0);
		await importer.ask("shutdown");
		await exporter.end();
		await importer.end();
		expect(await importer.ended).toEqual({ code: 0, account: undefined });
	});

	type Bad = [
		what: string,
		caches: (handle: Uint8Array, byteLength: number) => Record<string, LayerKv>,
		layout: Partial<KvCacheLayout>,
		error: { code: string; message: RegExp },
	];
	const one = (array: (handle: Uint8Array, byteLength: number) => unknown): Bad[1] => {
		return (handle, byteLength) => ({
			...byHandle(handle, byteLength),
			"layer.1": array(handle, byteLength) as KvIpcHandle,
		});
	};
	const invalid = (message: RegExp) => ({ code: "INVALID_ARGUMENT", message });
	const bad: Bad[] = [
		[
			"a handle that is too short",
			one((handle, byteLength) => ({ ipcHandle: handle.subarray(1), byteLength })),
			{},
			invalid(/IPC handle of layer layer\.1 has 63 bytes/),
		],
		[
			"a handle that is text",
			one((handle, byteLength) => ({ ipcHandle: Buffer.from(handle).toString(), byteLength })),
			{},
			invalid(/layer layer\.1 must be .*ipcHandle/),
		],
		[
			"an array that ends beyond the memory",
			one((ipcHandle, byteLength) => ({ ipcHandle, byteOffset: 3 * byteLength + 2, byteLength })),
			{},
			invalid(/1920 bytes at 13442 lie beyond the exported memory's 15360 bytes/),
		],
		[
			"an array that begins beyond all memory",
			one((ipcHandle, byteLength) => ({
				...{ ipcHandle, byteLength },
				byteOffset: Number.MAX_SAFE_INTEGER,
			})),
			{},
			invalid(/bytes at 9007199254740991 lie beyond/),
		],
		[
			"an offset below 0",
			one((ipcHandle, byteLength) => ({ ipcHandle, byteOffset: -2, byteLength })),
			{},
			invalid(/byteOffset of layer layer\.1.*-2/),
		],
		[
			"a length that is not the layout's",
			one((ipcHandle) => ({ ipcHandle, byteLength: 64 })),
			{},
			invalid(/layer layer\.1 has an array of 32 bytes/),
		],
		[
			"the address 0",
			(_, byteLength) =>
				Object.fromEntries(
					names.map((name, i) => [name, { pointer: BigInt(i) * 2n ** 40n, byteLength }]),
				),
			{},
			invalid(/address 0x0/),
		],
		[
			"an address of the host",
			(_, byteLength) =>
				Object.fromEntries(
					names.map((name, i) => [name, { pointer: BigInt(i + 1) * 2n ** 20n, byteLength }]),
				),
			{},
			invalid(/at 0x100000 are not memory of CUDA device 0/),
		],
		["a handle of the host's memory", byHandle, { device: "cpu" }, invalid(/IPC handle.*"cuda"/)],
		[
			"a device that is not there",
			byHandle,
			{ device: "cuda:3" },
			{ code: "CUDA_UNAVAILABLE", message: /device 3/ },
		],
	];

	it("is refused by what is wrong with it, and then registered as it should be", async () => {
		const [layout] = SHAPES;
		const byteLength = sizes(layout).layer;
		const { server } = await serve(16);
		const gone = await Exporter.start(LAYERS * byteLength);
		await gone.end();
		const exporter = await Exporter.start(LAYERS * byteLength);
		const importer = await Engine.start(root, server);
		const ended: Bad = [
			"a handle of a process that has ended",
			() => byHandle(gone.handle, byteLength),
			{},
			{ code: "CUDA_FAILED", message: /cuIpcOpenMemHandle.*the process that exports the memory/ },
		];
		for (const [what, caches, different, { code, message }] of [...bad, ended]) {
			const given = caches(exporter.handle, byteLength);
			const registering = importer.ask("register", given, { ...gpu(layout), ...different });
			const error = await registering.catch((error: unknown) => error);
			expect(error, what).toMatchObject({ code, message: expect.stringMatching(message) });
		}
		await exporter.write(content(LAYERS * byteLength, 1, 0));
		await importer.ask("register", byHandle(exporter.handle, byteLength), gpu(layout));
		expect(await importer.ask("store", FROM, TOKENS)).toEqual({ stored: 3 });
		await importer.ask("shutdown");
		await exporter.end();
		await importer.end();
		expect(await importer.ended).toEqual({ code: 0, account: undefined });
	});

	it("is refused when its handle is none", async () => {
		const [layout] = SHAPES;
		const { server } = await serve(16);
		const strict = { FAKECUDA_STRICT: "0" }; // bytes that nobody gave as a handle break CUDA's rules
		const importer = await Engine.start(root, server, strict);
		const none = byHandle(new Uint8Array(64).fill(7), sizes(layout).layer);
		const registering = importer.ask("register", none, gpu(layout));
		await expect(registering).rejects.toMatchObject({
			code: "CUDA_FAILED",
			message: expect.stringContaining("cuIpcOpenMemHandle"),
		});
		await importer.ask("shutdown");
		await importer.end();
		const { code, account } = await importer.ended;
		expect([code, account?.split(",")[0]]).toEqual([0, "1 violations; alive: 0 streams"]);
	});
});

/** Layers one behind the other in memory that was exported. */
function byHandle(ipcHandle: Uint8Array, byteLength: number): Record<string, KvIpcHandle> {
	const layers = names.map((name, i) => [
		name,
		{ ipcHandle, byteOffset: i * byteLength, byteLength },
	]);
	return Object.fromEntries(layers);
}

function gpu(layout: KvCacheLayout): KvCacheLayout {
	return { ...layout, device: "cuda" };
}

describe("a process that ends in mid-copy", () => {
	// 32 MiB: eight parts that the GPU is asked for, each of which takes it up to half a second.
	const large = { numBlocks: 64, numKvHeads: 8, headSize: 256, dtype: "float16" } as const;
	const layout: KvCacheLayout = { ...large, planes: "separate" };
	const tokens = range(0, 64 * 16);
	const blocks = range(0, 64);

	for (const [what, slots] of [
		["exitInStore", "slots_writing"],
		["exitInLoad", "slots_reading"],
	] as const) {
		it(`ends soon, with its own code, and its slots are given back (${what})`, async () => {
			const byteLength = sizes(layout).layer;
			const { server, client } = await serve(256);
			if (what === "exitInLoad") {
				await storeFromHost(client, byteLength);
				expect(await lookUp(client, tokens)).toBe(tokens.length);
			}
			const exporter = await Exporter.start(LAYERS * byteLength);
			// Node.js runs no clean-up at process.exit: what CUDA had for us goes with the process.
			const settings = { FAKECUDA_STRICT: "0", FAKECUDA_DELAY_US: "500000" };
			const engine = await Engine.start(root, server, settings);
			await engine.ask("register", byHandle(exporter.handle, byteLength), gpu(layout));
			engine.tell(what, 7, blocks, tokens, names[0]);
			const { code, account } = await within(15_000, engine.ended);
			expect(code).toBe(7);
			expect(account).toMatch(/^0 violations; .* [1-9]\d* pinned ranges/);
			for (const left of [slots, "slots_apart"]) {
				await expect.poll(async () => (await client.status())[left], LONG).toBe(0);
			}
			await exporter.end();
		});
	}

	it("ends though the GPU never does, and keeps until then what may be written", async () => {
		const byteLength = sizes(layout).layer;
		const { server, client } = await serve(256);
		const exporter = await Exporter.start(LAYERS * byteLength);
		const settings = { FAKECUDA_STRICT: "0", FAKECUDA_DELAY_US: "1000000000", FAKECUDA_SEED: "1" };
		const engine = await Engine.start(root, server, settings);
		await engine.ask("register", byHandle(exporter.handle, byteLength), gpu(layout));
		const failure = await within(25_000, engine.ask("shutdownInStore", blocks, tokens));
		expect(failure).toMatch(/does not come to the end.*start the process anew/);
		expect(await client.status()).toMatchObject({ slots_writing: 4, slots_apart: 0 });
		await within(25_000, engine.end());
		expect(await engine.ended).toMatchObject({ code: 0 });
		await expect.poll(async () => (await client.status()).slots_writing, LONG).toBe(0);
		await exporter.end();
	}, 60_000);

	async function storeFromHost(via: Client, byteLength: number): Promise<void> {
		const adapter = createWorkerAdapter({ via, modelName: "m", saveTimeoutMs: 60_000 });
		const connector = use(new WorkerConnector({ adapter }));
		const memory = names.map((name) => [name, new Uint8Array(new SharedArrayBuffer(byteLength))]);
		await connector.registerKvCaches(Object.fromEntries(memory), layout);
		const op = { tokenIds: tokens, start: 0, end: tokens.length, skipFirstNTokens: 0 };
		const store = { requestId: "r", direction: "STORE", cacheSalt: "" } as const;
		await run(connector, { requests: [{ ...store, op: { ...op, blockIds: [blocks] } }] });
		await sent(connector, "r");
		expect(adapter.storedChunks).toBe(4);
	}
});
