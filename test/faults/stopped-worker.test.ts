import { fork } from "node:child_process";
import { once } from "node:events";
import { fileURLToPath } from "node:url";
import { expect, it } from "vitest";
import { Client, PrefixCache } from "../../ts/index.js";
import { ServerProcess, stopProcess } from "../server-process.js";
import { payload, tokens } from "./prompts.mjs";

const BYTES = 100_000;
const CHUNK = 64;
const SERVER = fileURLToPath(new URL("quick-server.mjs", import.meta.url));
const WORKER = fileURLToPath(new URL("worker.mjs", import.meta.url));

it("a worker that was stopped in mid-copy past its deadline, and goes on later, spoils nothing", async () => {
	const options = {
		memory: 2 ** 20, // 10 chunks
		policy: "lru", // so that the prompts of the latest stores are those that stay
		chunkSize: CHUNK,
		reservationTimeoutMs: 100,
	};
	await using server = await ServerProcess.run(SERVER, JSON.stringify(options));
	const { url } = server;
	await using client = await Client.connect({ url });
	const apart = async () => (await client.status()).slots_apart;
	const stopped = fork(WORKER, [url, String(BYTES)], {
		stdio: ["pipe", "inherit", "inherit", "ipc"],
	});
	try {
		await once(stopped, "message");
		const held = once(stopped, "message");
		stopped.send({ first: 1, chunks: 4, holdAt: 1 });
		await held;
		await stopProcess(stopped);
		await expect.poll(apart).toBe(4);

		await using cache = await PrefixCache.open({
			via: client,
			identity: "faults",
			bytesPerChunk: BYTES,
		});
		const store = async (first: number, chunks: number) => {
			const prompt = tokens(CHUNK, first, chunks);
			return (await cache.store(prompt, (chunk) => payload(first, chunk, BYTES))).storedChunks;
		};
		const check = async (first: number, chunks: number) => {
			const loaded = await (await cache.lookup(tokens(CHUNK, first, chunks))).load();
			expect(loaded.length).toBe(chunks);
			for (const [chunk, bytes] of loaded.entries()) {
				expect(Buffer.compare(bytes, payload(first, chunk, BYTES))).toBe(0);
			}
		};
		// The same prompt is free for others, who fill what is left of the pool and evict each other.
		expect(await store(1, 4)).toBe(4);
		expect(await store(2, 6)).toBe(6);
		for (let first = 3; first < 9; first++) {
			expect(await store(first, 3)).toBe(3);
		}
		await check(7, 3);
		await check(8, 3);

		const answered = once(stopped, "message");
		stopped.stdin?.write("\n");
		stopped.kill("SIGCONT"); // it writes the rest into the slots that it was told of, and commits
		expect((await answered)[0]).toMatchObject({ storedChunks: 0 });
		expect(await apart()).toBe(0);
		await check(7, 3);
		await check(8, 3);
		expect(await store(1, 4)).toBe(4);
		await check(1, 4);
	} finally {
		stopped.kill("SIGCONT");
		stopped.kill("SIGKILL");
	}
});
