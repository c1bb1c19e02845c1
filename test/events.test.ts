import { afterEach, describe, expect, it } from "vitest";
import { Client, chunkHashes, PrefixCache, Server } from "../ts/index.js";

const CHUNK = 16;
const BYTES = 4000;

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

function held<T extends AsyncDisposable>(handle: T): T {
	open.push(handle);
	return handle;
}

/** A server with room for a few chunks. */
async function start(chunks: number): Promise<Server> {
	// With its header each of them is just below a page.
	return held(await Server.start({ port: 0, memory: chunks * 4096, chunkSize: CHUNK }));
}

async function cacheOf(via: Server | Client): Promise<PrefixCache> {
	return held(await PrefixCache.open({ via, identity: "model", bytesPerChunk: BYTES }));
}

function tokens(chunks: number, first = 0): Uint32Array {
	return Uint32Array.from({ length: chunks * CHUNK }, (_, at) => first + at);
}

const bytesOf = () => new Uint8Array(BYTES);

function hashesOf(prompt: Uint32Array): Uint8Array[] {
	return [...chunkHashes(prompt, { chunkSize: CHUNK })];
}

describe("events", () => {
	it("tell what was stored, with whose it is, to this process and to others", async () => {
		const server = await start(8);
		const cache = await cacheOf(server);
		const before = Date.now();
		await cache.store(tokens(2), bytesOf, { cacheSalt: "tenant" });
		const [first, second] = hashesOf(tokens(2)) as [Uint8Array, Uint8Array];
		const told = await server.events();
		const common = {
			kind: "stored",
			modelName: expect.stringMatching(/^kvferry\/[0-9a-f]{64}$/),
			kvWorldSize: 1,
			kvWorkerId: 0,
			cacheSalt: "tenant",
			atMs: expect.any(Number),
		};
		expect(told).toEqual({
			incarnation: expect.stringMatching(/^[0-9a-f]{32}$/),
			nextCursor: 3,
			lost: false,
			events: [
				{ ...common, sequence: 1, chunkHash: first, parentChunkHash: undefined },
				{ ...common, sequence: 2, chunkHash: second, parentChunkHash: first },
			],
		});
		for (const { atMs } of told.events) {
			expect(atMs).toBeGreaterThanOrEqual(before);
			expect(atMs).toBeLessThanOrEqual(Date.now());
		}
		const client = held(await Client.connect({ url: `tcp://${server.address}` }));
		expect(await client.events()).toEqual(told);
	});

	it("let an index follow the cache, in parts and through evictions", async () => {
		const server = await start(4);
		const client = held(await Client.connect({ url: `tcp://${server.address}` }));
		const cache = await cacheOf(client);
		const index = new Set<string>();
		const hex = (hash: Uint8Array) => Buffer.from(hash).toString("hex");
		let cursor = 0;
		let heard = 0;
		for (let prompt = 0; prompt < 6; prompt++) {
			await cache.store(tokens(1, prompt * 100), bytesOf);
		}
		for (;;) {
			const told = await client.events({ cursor, maxEvents: 3 });
			expect(told.lost).toBe(false);
			expect(told.events.length).toBeLessThanOrEqual(3);
			for (const { sequence, kind, chunkHash } of told.events) {
				expect(sequence).toBe(++heard);
				if (kind === "stored") {
					index.add(hex(chunkHash));
				} else {
					expect(index.delete(hex(chunkHash))).toBe(true);
				}
			}
			cursor = told.nextCursor;
			if (told.events.length === 0) {
				break;
			}
		}
		expect([heard, cursor]).toEqual([8, 9]);
		const latest = [2, 3, 4, 5].flatMap((prompt) => hashesOf(tokens(1, prompt * 100)).map(hex));
		expect([...index]).toEqual(latest);
	});

	it("of another start of the server have another incarnation", async () => {
		const first = await start(4);
		await (await cacheOf(first)).store(tokens(2), bytesOf);
		const { incarnation, nextCursor } = await first.events();
		const second = await start(4);
		const told = await second.events({ cursor: nextCursor });
		expect(told).toMatchObject({ lost: true, events: [], nextCursor: 1 });
		expect(told.incarnation).not.toBe(incarnation);
	});

	it.each([
		[{ cursor: -1 }, "cursor"],
		[{ cursor: 1.5 }, "cursor"],
		[{ cursor: 2 ** 53 }, "cursor"],
		[{ maxEvents: 0 }, "maxEvents"],
		[{ maxEvents: 16_385 }, "maxEvents"],
		[{ timeoutMs: 0 }, "timeoutMs"],
	])("refuse %j", async (options, name) => {
		const server = await start(4);
		await expect(server.events(options)).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringContaining(name),
		});
	});

	it("end with their handle", async () => {
		const server = await start(4);
		const client = held(await Client.connect({ url: `tcp://${server.address}` }));
		await client.close();
		await expect(client.events()).rejects.toMatchObject({ code: "CLOSED" });
		await server.close();
		await expect(server.events()).rejects.toMatchObject({ code: "CLOSED" });
	});
});
