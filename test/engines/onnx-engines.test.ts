// onnxruntime-node and transformers.js with a tiny model, against the same without a cache.

import { execFile } from "node:child_process";
import { open, readFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterEach, describe, expect, it } from "vitest";
import { Client } from "../../ts/client.js";
import { OnnxPrefixCache, type OnnxPrefixCacheOptions } from "../../ts/engines/onnx.js";
import { identityOf } from "../../ts/engines/onnx-identity.js";
import { layoutOf } from "../../ts/engines/onnx-layout.js";
import { ServerProcess } from "../server-process.js";
import { openOnnx, type Session } from "./onnx-engine.js";
import { base64, evaluate } from "./onnx-session.mjs";

const CHUNK = 32;
const PROMPT = Array.from({ length: 140 }, (_, at) => (at * 37 + 11) % 256);
const SPLIT = 4 * CHUNK;

const engine = openOnnx();
const handles: (() => Promise<unknown>)[] = [];

afterEach(async () => {
	for (const close of handles.splice(0).reverse()) {
		await close();
	}
});

async function newServer(...args: string[]): Promise<ServerProcess> {
	const server = await ServerProcess.start("--chunk-size", String(CHUNK), ...args);
	handles.push(() => server[Symbol.asyncDispose]());
	return server;
}

describe.skipIf(engine === undefined)("onnxruntime-node", () => {
	const tiny = engine as NonNullable<typeof engine>; // else this is skipped

	async function newSession(name?: string): Promise<Session> {
		const session = await tiny.open(name);
		handles.push(() => session.release());
		return session;
	}

	async function newCache(
		server: ServerProcess,
		options: Partial<OnnxPrefixCacheOptions> = {},
	): Promise<{ cache: OnnxPrefixCache; session: Session }> {
		const client = await Client.connect({ url: server.url });
		handles.push(() => client.close());
		const session = await newSession();
		const cache = await OnnxPrefixCache.open({
			...{ session, Tensor: tiny.ort.Tensor, modelPath: tiny.file("model.onnx"), via: client },
			...options,
		});
		handles.push(() => cache.close());
		return { cache, session };
	}

	/** Loads what there is of `PROMPT`, evaluates the rest, and generates. */
	async function answer(cache: OnnxPrefixCache, session: Session) {
		const loaded = await cache.load(PROMPT);
		expect(loaded.failure).toBeUndefined();
		const rest = PROMPT.slice(loaded.hitTokens);
		return { ...loaded, ...(await evaluate(tiny.ort, session, loaded.feeds, rest, 8)) };
	}

	/** What the engine gives without a cache: its first `split` tokens evaluated on their own. */
	async function cold(cache: OnnxPrefixCache, session: Session, split: number) {
		const { feeds } = await cache.load([]);
		if (split === 0) {
			return await evaluate(tiny.ort, session, feeds, PROMPT, 8);
		}
		const { outputs } = await evaluate(tiny.ort, session, feeds, PROMPT.slice(0, split));
		const kv = Object.entries(outputs).map(([name, tensor]) => [
			name.replace("present", "past_key_values"),
			tensor,
		]);
		const { logits: _, ...past } = Object.fromEntries(kv);
		return await evaluate(tiny.ort, session, past, PROMPT.slice(split), 8);
	}

	/** Stores the first `SPLIT` tokens of `PROMPT`, evaluated on their own. */
	async function store(cache: OnnxPrefixCache, session: Session) {
		const first = PROMPT.slice(0, SPLIT);
		const { outputs } = await evaluate(tiny.ort, session, (await cache.load([])).feeds, first);
		return await cache.save(first, outputs);
	}

	it.each(["model.onnx", "model_fp16.onnx"])(
		"computes the same logits in a new process after a load: %s",
		async (name) => {
			const server = await newServer();
			const session = await newSession(name);
			const modelPath = tiny.file(name);
			const { cache } = await newCache(server, { session, modelPath });
			expect(await store(cache, session)).toMatchObject({ storedTokens: SPLIT });

			const script = fileURLToPath(new URL("onnx-session.mjs", import.meta.url));
			const args = [script, modelPath, server.url, JSON.stringify(PROMPT), "8"];
			const { stdout } = await promisify(execFile)(process.execPath, args);
			const warm: { hitTokens: number; tokens: number[]; logits: string[] } = JSON.parse(stdout);
			expect(warm.hitTokens).toBe(SPLIT);
			const { logits } = await cold(cache, session, SPLIT);
			expect(warm.logits).toEqual(logits.map(base64)); // bit by bit
			const single = await cold(cache, session, 0);
			expect(warm.tokens).toEqual(single.tokens);
		},
	);

	it("goes on with a conversation that grows", async () => {
		const server = await newServer();
		const { cache, session } = await newCache(server);
		const sizes: number[] = [];
		let conversation = PROMPT.slice(0, 50);
		for (let turn = 0; turn < 4; turn++) {
			const { hitTokens, feeds } = await cache.load(conversation);
			expect(hitTokens).toBe(turn === 0 ? 0 : sizes.at(-1));
			const rest = conversation.slice(hitTokens);
			const { outputs, tokens } = await evaluate(tiny.ort, session, feeds, rest, 20);
			const fresh = await evaluate(
				tiny.ort,
				session,
				(await cache.load([])).feeds,
				conversation,
				20,
			);
			expect(tokens).toEqual(fresh.tokens);
			conversation = [...conversation, ...tokens];
			const { storedTokens } = await cache.save(conversation, outputs);
			sizes.push(storedTokens);
			conversation = [...conversation, ...PROMPT.slice(turn * 20, turn * 20 + 15)];
		}
		expect(sizes).toEqual([64, 96, 128, 160]);
	});

	/** Changes the server's pool where the headers of its objects lie. */
	async function damage(server: ServerProcess, change: (pool: Buffer, objects: number[]) => void) {
		const path = `/dev/shm/${server.shmName}`;
		const before = await readFile(path);
		const objects: number[] = [];
		for (let at = before.indexOf("KVFY"); at >= 0; at = before.indexOf("KVFY", at + 4)) {
			objects.push(at);
		}
		expect(objects).toHaveLength(4);
		const after = Buffer.from(before);
		change(after, objects);
		const file = await open(path, "r+");
		for (const at of objects) {
			await file.write(after, at, CHUNK * 256 + 64, at);
		}
		await file.close();
	}

	it.each<[string, number, (pool: Buffer, objects: number[]) => void]>([
		[
			"a flipped bit",
			2 * CHUNK,
			(pool, [, , third = 0]) =>
				pool.writeUInt8(pool.readUInt8(third + 5_000) ^ 0x40, third + 5_000),
		],
		[
			"a swapped chunk",
			CHUNK,
			(pool, [, second = 0, third = 0]) => {
				const length = CHUNK * 256 + 64;
				const kept = Buffer.from(pool.subarray(second, second + length));
				pool.copy(pool, second, third, third + length);
				kept.copy(pool, third);
			},
		],
	])("never sees %s: it is computed and stored anew", async (_name, whole, change) => {
		const server = await newServer();
		const { cache, session } = await newCache(server);
		await store(cache, session);
		await damage(server, change);
		const warm = await answer(cache, session);
		expect(cache.damagedChunks).toBe(1);
		expect(warm.hitTokens).toBe(whole);
		expect(warm.logits).toEqual((await cold(cache, session, whole)).logits);
		// The server drops what was damaged. Each load finds the first chunk that is.
		const again = async () => {
			await cache.save([...PROMPT, ...warm.tokens], warm.outputs);
			return (await cache.load(PROMPT)).hitTokens;
		};
		await expect.poll(again).toBe(SPLIT);
	});

	it("keeps tenants apart", async () => {
		const { cache, session } = await newCache(await newServer());
		const first = PROMPT.slice(0, SPLIT);
		const { outputs } = await evaluate(tiny.ort, session, (await cache.load([])).feeds, first);
		await cache.save(first, outputs, { cacheSalt: "tenant" });
		const hits = async (cacheSalt?: string) => (await cache.load(PROMPT, { cacheSalt })).hitTokens;
		expect([await hits("tenant"), await hits("other"), await hits()]).toEqual([SPLIT, 0, 0]);
	});

	it("stores anew after the server's restart", async () => {
		const server = await newServer();
		const { cache, session } = await newCache(server);
		await store(cache, session);
		expect((await cache.load(PROMPT)).hitTokens).toBe(SPLIT);
		await server.kill();
		await newServer("--port", server.port);
		await expect.poll(async () => (await cache.load(PROMPT)).failure).toBeUndefined();
		const lost = await answer(cache, session);
		expect(lost.hitTokens).toBe(0);
		expect(lost.tokens).toEqual((await cold(cache, session, 0)).tokens);
		expect(await store(cache, session)).toMatchObject({ storedTokens: SPLIT });
		const again = await answer(cache, session);
		expect(again.hitTokens).toBe(SPLIT);
		expect(again.logits).toEqual((await cold(cache, session, SPLIT)).logits);
	});

	it("without KV inputs is refused", async () => {
		const server = await newServer();
		const session = await newSession("no_cache.onnx");
		await expect(newCache(server, { session })).rejects.toMatchObject({
			code: "UNSUPPORTED_MODEL",
		});
	});

	it("has weights in other files hashed too", async () => {
		const session = await newSession("external.onnx");
		const modelPath = tiny.file("external.onnx");
		const identity = await identityOf(session, layoutOf(session, undefined), { modelPath });
		expect(JSON.parse(identity).model.external).toHaveLength(1);
	});
});

describe.skipIf(engine === undefined)("transformers.js", () => {
	const script = fileURLToPath(new URL("onnx-process.mjs", import.meta.url));

	/** One process: see there. */
	async function run(mode: string, dtype: string, url: string) {
		const args = [
			script,
			mode,
			engine?.model ?? "",
			dtype,
			url,
			JSON.stringify(PROMPT),
			String(SPLIT),
		];
		const { stdout } = await promisify(execFile)(process.execPath, args);
		return JSON.parse(stdout) as {
			hitTokens?: number;
			storedTokens?: number;
			failure?: string;
			sequence: number[];
			logits: string[];
		};
	}

	it.each(["fp32", "fp16"])(
		"generates the same in a new process after a load: %s",
		async (dtype) => {
			const { url } = await newServer();
			const stored = await run("store", dtype, url);
			expect(stored).toMatchObject({ hitTokens: 0, storedTokens: SPLIT });
			const warm = await run("load", dtype, url);
			expect(warm).toMatchObject({ hitTokens: SPLIT, storedTokens: SPLIT });
			const cold = await run("cold", dtype, url);
			expect(warm.logits).toHaveLength(8);
			expect(warm.logits).toEqual(cold.logits); // bit by bit
			expect(await run("unmasked", dtype, url)).toEqual(warm);
			const single = await run("single", dtype, url);
			expect(warm.sequence).toEqual(single.sequence);
			expect(warm.sequence).toHaveLength(PROMPT.length + 8);
		},
		120_000,
	);
});

describe.skipIf(engine === undefined)("examples/onnx-chat", () => {
	it("finds its document in the second process", async () => {
		const { url } = await newServer();
		const script = fileURLToPath(new URL("../../examples/onnx-chat/engine.mjs", import.meta.url));
		const args = [script, "--model", join(engine?.model ?? "", "onnx", "model.onnx"), "--url", url];
		const run = async () => JSON.parse((await promisify(execFile)(process.execPath, args)).stdout);
		const first = await run();
		expect(first).toMatchObject({ hit_tokens: 0 });
		const second = await run();
		expect(second.hit_tokens).toBeGreaterThan(CHUNK);
		expect(second.response).toEqual(first.response);
	}, 60_000);
});
