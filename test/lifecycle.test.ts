import { spawn } from "node:child_process";
import { once } from "node:events";
import { text } from "node:stream/consumers";
import { setImmediate } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { Worker } from "node:worker_threads";
import { describe, expect, it } from "vitest";
import { Client, PrefixCache, Server } from "../ts/index.js";
import { ServerProcess } from "./server-process.js";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const BYTES = 8 * 2 ** 20;

/** An engine in whatever thread or process runs it; `url` is the server's. */
const ENGINE = `
	import { Client, PrefixCache, Server } from "${new URL("../dist/index.js", import.meta.url)}";
	const bytesPerChunk = ${BYTES};
	const open = async (url) => {
		const client = await Client.connect({ url });
		const cache = await PrefixCache.open({ via: client, identity: "lifecycle", bytesPerChunk });
		while ((await client.status()).reserved_bytes < 2 ** 27); // the pool grows in the background
		return cache;
	};
	const prompt = (first) => Uint32Array.from({ length: 4 * 256 }, (_, at) => first * 10_000 + at);
	const bytes = new Uint8Array(bytesPerChunk);
`;

/** The same with paged KV memory on SharedArrayBuffers, which copies of 64 MiB run to and from by themselves. */
const PAGED = `
	import { createWorkerAdapter, WorkerConnector } from "${new URL("../dist/index.js", import.meta.url)}";
	const layout = { numBlocks: 2, blockSize: 256, numKvHeads: 8, headSize: 1024, dtype: "float16" };
	const layers = Array.from({ length: 4 }, (_, n) => [
		"layer." + n,
		new Uint8Array(new SharedArrayBuffer(2 * 2 * 256 * 8 * 1024 * 2)).fill(n + 1),
	]);
	const copying = async (url, first) => {
		const via = await Client.connect({ url });
		const adapter = createWorkerAdapter({ via, modelName: "m", saveTimeoutMs: 30_000 });
		const connector = new WorkerConnector({ adapter });
		const openWorker = via.openWorker.bind(via);
		const begun = new Promise((resolve) => {
			via.openWorker = async (...args) => {
				const native = await openWorker(...args);
				const storeBlocks = native.storeBlocks.bind(native);
				native.storeBlocks = (...args) => {
					const store = storeBlocks(...args);
					void store.copied(1).then(resolve);
					return store;
				};
				return native;
			};
		});
		await connector.registerKvCaches(Object.fromEntries(layers), layout);
		while ((await via.status()).reserved_bytes < 2 ** 27);
		const tokenIds = Array.from({ length: 512 }, (_, at) => first * 10_000 + at);
		const op = { tokenIds, start: 0, end: 512, blockIds: [[0, 1]], skipFirstNTokens: 0 };
		connector.bindConnectorMetadata({
			requests: [{ requestId: "r", direction: "STORE", op, cacheSalt: "" }],
		});
		void connector.waitForSave();
		await begun;
	};
`;

/** Runs a script in a process of its own; resolves to how that ended and what it printed. */
async function run(script: string): Promise<{ code: number | null; out: string; err: string }> {
	const child = spawn(process.execPath, ["--input-type=module", "-e", ENGINE + script], {
		cwd: ROOT,
		timeout: 25_000, // a test that fails leaves nothing behind
		stdio: ["ignore", "pipe", "pipe"],
	});
	const exit = once(child, "exit") as Promise<[number | null]>;
	const [out, err, [code]] = await Promise.all([text(child.stdout), text(child.stderr), exit]);
	return { code, out, err };
}

function worker(script: string, url: string): Worker {
	const source = `${ENGINE}
		import { parentPort, workerData as url } from "node:worker_threads";
		${script}`;
	return new Worker(new URL(`data:text/javascript,${encodeURIComponent(source)}`), {
		workerData: url,
	});
}

describe("a process with open handles", () => {
	it("ends by itself when only clients and caches are open", async () => {
		await using server = await ServerProcess.start("--memory", "128MiB");
		const ended = await run(`
			const cache = await open("${server.url}");
			await cache.store(prompt(1), () => bytes);
			console.log((await cache.lookup(prompt(1))).chunks);
		`);
		expect(ended).toEqual({ code: 0, out: "4\n", err: "" });
	});

	it("ends by itself while it looks for a server", async () => {
		const ended = await run(`
			const url = "tcp://127.0.0.1:9"; // nobody listens there
			const client = await Client.connect({ url, whenUnreachable: "warn", onWarning() {} });
			const cache = await PrefixCache.open({ via: client, identity: "x", bytesPerChunk });
			console.log((await cache.lookup(prompt(1))).failure.code);
		`);
		expect(ended).toEqual({ code: 0, out: "UNREACHABLE\n", err: "" });
	});

	it("ends by itself when it embeds a server that does not listen", async () => {
		const ended = await run(`
			const server = await Server.start({ listen: false, memory: 2 ** 26 });
			const cache = await PrefixCache.open({ via: server, identity: "x", bytesPerChunk });
			console.log((await cache.store(prompt(1), () => bytes)).storedChunks);
		`);
		expect(ended).toEqual({ code: 0, out: "4\n", err: "" });
	});

	it("exits in the middle of copies that run by themselves, and leaves the server whole", async () => {
		await using server = await ServerProcess.start("--memory", "128MiB");
		await using client = await Client.connect({ url: server.url });
		for (const [first, turns] of [0, 1, 3, 10, 30, 100].entries()) {
			const ended = await run(`
				${PAGED}
				await copying("${server.url}", ${first});
				let left = ${turns};
				const exit = () => left-- > 0 ? setImmediate(exit) : process.exit(7);
				exit();
			`);
			expect(ended).toEqual({ code: 7, out: "", err: "" });
		}
		await expect.poll(async () => await client.status()).toMatchObject({ slots_writing: 0 });
	});

	it("exits at once when told to, in the middle of everything, and leaves the server whole", async () => {
		await using server = await ServerProcess.start("--memory", "128MiB");
		const ended = await run(`
			const cache = await open("${server.url}");
			await cache.store(prompt(1), () => bytes);
			for (let first = 1; first < 3; first++) {
				void cache.lookup(prompt(first)).then((hit) => hit.load());
				void cache.store(prompt(first), () => bytes);
			}
			await cache.store(prompt(9), (chunk) => chunk === 2 ? process.exit(7) : bytes);
		`);
		expect(ended).toEqual({ code: 7, out: "", err: "" });
		await using client = await Client.connect({ url: server.url });
		await expect
			.poll(async () => await client.status())
			.toMatchObject({ slots_writing: 0, slots_reading: 0, leases: 0 });
	});
});

it("a server that listens does so until it is closed, also when nothing refers to it", async () => {
	const start = async () => {
		const options = { port: 0, memory: 2 ** 20, keepAlive: false };
		return (await Server.start(options)).address;
	};
	const address = await start();
	setFlagsFromString("--expose-gc");
	const collect = runInNewContext("gc") as () => void;
	for (let round = 0; round < 5; round++) {
		collect();
		await setImmediate();
	}
	await using client = await Client.connect({ url: `tcp://${address}` });
	expect(await client.ping()).toBeGreaterThan(0);
});

describe("worker threads", () => {
	it("use the addon side by side with the main thread, and may end in mid-operation", async () => {
		await using server = await ServerProcess.start("--memory", "128MiB");
		const busy = `
			const cache = await open(url);
			for (let round = 0; ; round++) {
				const first = 1 + (round % 3);
				await cache.store(prompt(first), () => bytes.fill(first));
				const loaded = await (await cache.lookup(prompt(first))).load();
				parentPort.postMessage(loaded.every((one) => one.every((byte) => byte === first)));
			}
		`;
		const workers = [worker(busy, server.url), worker(busy, server.url)];
		for (const one of workers) {
			const [right] = (await once(one, "message")) as [boolean];
			expect(right).toBe(true);
		}
		for (const one of workers) {
			await one.terminate();
		}
		await using client = await Client.connect({ url: server.url });
		await using cache = await PrefixCache.open({
			via: client,
			identity: "main",
			bytesPerChunk: BYTES,
		});
		const tokens = new Uint32Array(256);
		const stored = await cache.store(tokens, () => new Uint8Array(BYTES).fill(1));
		expect(stored.failure).toBeUndefined();
		const again = worker(`${busy}`, server.url);
		expect((await once(again, "message"))[0]).toBe(true);
		await again.terminate();
	});

	it("may end in the middle of copies that run by themselves", async () => {
		await using server = await ServerProcess.start("--memory", "256MiB");
		await using client = await Client.connect({ url: server.url });
		for (let round = 0; round < 6; round++) {
			const one = worker(
				`${PAGED} await copying(url, ${round}); parentPort.postMessage("begun");`,
				server.url,
			);
			await once(one, "message");
			await one.terminate();
			await expect.poll(async () => (await client.status()).slots_writing).toBe(0);
		}
	});

	it("may be sent the buffer that a chunk was read into, and one that is to be stored", async () => {
		await using server = await ServerProcess.start();
		await using client = await Client.connect({ url: server.url });
		await using cache = await PrefixCache.open({
			via: client,
			identity: "transfer",
			bytesPerChunk: 1000,
		});
		const tokens = new Uint32Array(256);
		await cache.store(tokens, () => new Uint8Array(1000).fill(5));
		const [bytes] = await (await cache.lookup(tokens)).load();
		const sent = structuredClone(bytes, { transfer: [bytes?.buffer as ArrayBuffer] });
		expect(sent?.every((byte) => byte === 5)).toBe(true);
		const gone = new Uint8Array(1000);
		structuredClone(gone, { transfer: [gone.buffer] });
		const other = Uint32Array.from(tokens, () => 7);
		await expect(cache.store(other, () => gone)).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringContaining("detached"),
		});
		const shared = new Uint8Array(new SharedArrayBuffer(1000)).fill(6);
		expect((await cache.store(other, () => shared)).storedChunks).toBe(1);
		const into = new Uint8Array(new SharedArrayBuffer(1000));
		await (await cache.lookup(other)).load(() => into);
		expect(into).toEqual(shared);
	});
});
