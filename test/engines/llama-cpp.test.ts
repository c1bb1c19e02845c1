import { readdirSync, readlinkSync } from "node:fs";
import { copyFile, mkdtemp, open, readFile, rename, rm, unlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { doctorOptions } from "../../ts/cli/options.js";
import { Client } from "../../ts/client.js";
import {
	LlamaPrefixCache,
	type LlamaPrefixCacheOptions,
	type RestoreResult,
} from "../../ts/engines/llama-cpp.js";
import { Server } from "../../ts/server.js";
import { ServerProcess } from "../server-process.js";
import { complete, type Engine, openEngine, type TestContext } from "./llama-engine.js";

const CHUNK = 32;

let engine: Engine;
const handles: (() => Promise<unknown>)[] = [];

beforeAll(async () => {
	engine = await openEngine();
}, 600_000); // the first time downloads 180 MB

afterEach(async () => {
	for (const close of handles.splice(0).reverse()) {
		await close();
	}
});

afterAll(() => engine.dispose());

async function newServer(): Promise<Server> {
	const server = await Server.start({ listen: false, memory: 2 ** 27, chunkSize: CHUNK });
	handles.push(() => server.close());
	return server;
}

async function newContext(options?: object): Promise<TestContext> {
	const context = await engine.createContext(options);
	handles.push(() => context.dispose());
	return context;
}

async function openCache(
	context: TestContext,
	via: Client | Server,
	options: Partial<LlamaPrefixCacheOptions> = {},
): Promise<LlamaPrefixCache> {
	const cache = await LlamaPrefixCache.open({ context, via, ...options });
	handles.push(() => cache.close());
	return cache;
}

/** A context, and a cache for it. */
async function newCache(via: Client | Server, contextOptions?: object) {
	const context = await newContext(contextOptions);
	return { context, cache: await openCache(context, via) };
}

/** Stores the state of `prompt`, from a context that ends then. */
async function store(via: Server, prompt: number[], contextOptions?: object) {
	const { context, cache } = await newCache(via, contextOptions);
	const sequence = context.getSequence();
	expect(await cache.restore(sequence, prompt)).toMatchObject({ hitTokens: 0, readyTokens: 0 });
	await complete(sequence, prompt, 1);
	const saved = await cache.save(sequence);
	await sequence.dispose();
	return saved;
}

/** What the engine answers with the same batches and no cache. */
async function control(prompt: number[], hit: number, contextOptions?: object): Promise<number[]> {
	const sequence = (await newContext(contextOptions)).getSequence();
	await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, hit));
	return complete(sequence, prompt);
}

const hit = (hitTokens: number): Partial<RestoreResult> => ({ hitTokens, readyTokens: hitTokens });

describe("a stored prompt", () => {
	it.each([
		["flash attention", { flashAttention: true }],
		["no flash attention, values transposed", { flashAttention: false }],
		[
			"a KV cache of q8_0",
			{
				flashAttention: true,
				experimentalKvCacheKeyType: "Q8_0",
				experimentalKvCacheValueType: "Q8_0",
			},
		],
		["several sequences", { sequences: 3 }],
	])("is loaded by another context, with the same answer: %s", async (_name, options) => {
		const via = await newServer();
		const prompt = engine.tokens.slice(0, 140);
		expect(await store(via, prompt, options)).toMatchObject({ storedTokens: 128 });

		const { context, cache } = await newCache(via, options);
		const sequence = context.getSequence();
		const restored = await cache.restore(sequence, prompt);
		expect(restored).toMatchObject(hit(128));
		expect(restored.failure).toBeUndefined();
		expect(await complete(sequence, prompt)).toEqual(await control(prompt, 128, options));
	});

	it("serves every prompt that begins like it", async () => {
		const via = await newServer();
		await store(via, engine.tokens.slice(0, 140));
		const { context, cache } = await newCache(via);
		const sequence = context.getSequence();
		const prompt = [...engine.tokens.slice(0, 70), ...engine.tokens.slice(200, 260)];
		expect(await cache.restore(sequence, prompt)).toMatchObject(hit(64));
		expect(await complete(sequence, prompt)).toEqual(await control(prompt, 64));
	});

	it("leaves one token to be evaluated at least", async () => {
		const via = await newServer();
		await store(via, engine.tokens.slice(0, 128));
		const { context, cache } = await newCache(via);
		const sequence = context.getSequence();
		expect(await cache.restore(sequence, engine.tokens.slice(0, 128))).toMatchObject(hit(96));
		expect(await cache.restore(sequence, engine.tokens.slice(0, 129))).toMatchObject(hit(128));
	});

	it("is loaded into any sequence, beside others at work", async () => {
		const via = await newServer();
		const prompt = engine.tokens.slice(0, 100);
		await store(via, prompt, { sequences: 2 });
		const { context, cache } = await newCache(via, { sequences: 2 });
		const [first, second] = [context.getSequence(), context.getSequence()];
		const [busy] = await Promise.all([
			complete(first, engine.tokens.slice(200, 260)),
			cache.restore(second, prompt),
		]);
		expect(await complete(second, prompt)).toEqual(await control(prompt, 96, { sequences: 2 }));
		expect(busy).toEqual(await control(engine.tokens.slice(200, 260), 0, { sequences: 2 }));
	});

	it("is no hit for another tenant, KV type, flash-attention mode, model or LoRA", async () => {
		const via = await newServer();
		const prompt = engine.tokens.slice(0, 70);
		await store(via, prompt);
		const { context, cache } = await newCache(via);
		const tenant = { cacheSalt: "tenant" };
		expect(await cache.restore(context.getSequence(), prompt, tenant)).toMatchObject(hit(0));
		for (const options of [
			{ flashAttention: false },
			{ experimentalKvCacheKeyType: "Q8_0", flashAttention: true },
		]) {
			const other = await newCache(via, options);
			expect(await other.cache.restore(other.context.getSequence(), prompt)).toMatchObject(hit(0));
		}
		for (const options of [{ modelSha256: "0".repeat(64) }, { lora: "adapter" }]) {
			const apart = await newContext();
			const other = await openCache(apart, via, options);
			expect(await other.restore(apart.getSequence(), prompt)).toMatchObject(hit(0));
		}
	});
});

describe("what a sequence holds itself", () => {
	it("stays when the cache has no more, without what does not match", async () => {
		const { context, cache } = await newCache(await newServer());
		const sequence = context.getSequence();
		await complete(sequence, engine.tokens.slice(0, 60), 1);
		const prompt = [...engine.tokens.slice(0, 50), ...engine.tokens.slice(100, 150)];
		expect(await cache.restore(sequence, prompt)).toMatchObject({ hitTokens: 0, readyTokens: 50 });
		expect(sequence.contextTokens).toEqual(prompt.slice(0, 50));
	});

	it("is replaced when the cache has more", async () => {
		const via = await newServer();
		const prompt = engine.tokens.slice(0, 140);
		await store(via, prompt);
		const { context, cache } = await newCache(via);
		const sequence = context.getSequence();
		await complete(sequence, engine.tokens.slice(0, 60), 1);
		expect(await cache.restore(sequence, prompt)).toMatchObject(hit(128));
		expect(await complete(sequence, prompt)).toEqual(await control(prompt, 128));
	});

	it("is stored once", async () => {
		const { context, cache } = await newCache(await newServer());
		const sequence = context.getSequence();
		await complete(sequence, engine.tokens.slice(0, 70), 1);
		const first = await cache.save(sequence);
		expect(first.storedTokens).toBe(64);
		expect(first.bytes).toBeGreaterThan(64 * 23_040);
		expect(await cache.save(sequence)).toMatchObject({ storedTokens: 64, bytes: 0 });
		await complete(sequence, engine.tokens.slice(0, 100), 1);
		const grown = await cache.save(sequence);
		expect(grown.storedTokens).toBe(96);
		expect(grown.bytes).toBe(first.bytes / 2);
	});

	it("is not stored where a context shift has moved it", async () => {
		const via = await newServer();
		const { context, cache } = await newCache(via);
		const sequence = context.getSequence();
		const prompt = engine.tokens.slice(0, 140);
		await cache.restore(sequence, prompt);
		await complete(sequence, prompt, 1);
		await sequence.eraseContextTokenRanges([{ start: 70, end: 80 }]);
		expect(await cache.save(sequence)).toMatchObject({ storedTokens: 0 });
		// Another prompt that begins with the same token: what has moved is left behind.
		const other = [prompt[0] as number, ...engine.tokens.slice(200, 240)];
		await cache.restore(sequence, other);
		await complete(sequence, other, 1);
		expect(await cache.save(sequence)).toMatchObject({ storedTokens: 32 });
	});

	it("is not stored where the engine has moved it among the same tokens", async () => {
		const { context, cache } = await newCache(await newServer(), { contextSize: 256 });
		const sequence = context.getSequence();
		const prompt = Array<number>(250).fill(engine.tokens[5] as number);
		await cache.restore(sequence, prompt);
		await sequence.evaluateWithoutGeneratingNewTokens(prompt);
		await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, 20)); // the engine makes room
		expect(sequence.contextTokens).toEqual(prompt.slice(0, sequence.nextTokenIndex));
		expect(await cache.save(sequence)).toMatchObject({ storedTokens: 0 });
	});
});

describe("a chat", () => {
	const QUESTION = "What does a bicycle cost?";

	it("gets the answer that it gets without the cache, sooner the next time", async () => {
		const via = await newServer();
		const system = "The ferry costs forty crowns, a bicycle ten, and dogs are free of charge.";
		const options = { temperature: 0, maxTokens: 16 };
		const plain = engine.createSession((await newContext()).getSequence(), system);
		const expected = await plain.prompt(QUESTION, options);

		for (const restored of [{ hitTokens: 0 }, hit(32)]) {
			const { context, cache } = await newCache(via);
			const session = engine.createSession(context.getSequence(), system);
			const answer = await cache.prompt(session, QUESTION, options);
			expect(answer).toMatchObject({ response: expected, restored });
			expect(answer.saved.storedTokens).toBeGreaterThanOrEqual(32);
			session.dispose();
		}
		plain.dispose();
	});

	it("keeps its answer when the cache is closed meanwhile", async () => {
		const { context, cache } = await newCache(await newServer());
		const session = engine.createSession(context.getSequence(), "Be brief.");
		let closing: Promise<void> | undefined;
		const onTextChunk = () => {
			closing ??= cache.close();
		};
		const answering = cache.prompt(session, QUESTION, { maxTokens: 4, onTextChunk });
		const waiting = cache.prompt(session, QUESTION, { maxTokens: 4 });
		const failure = { code: "CLOSED" };
		const answer = await answering;
		expect(answer).toMatchObject({ saved: { storedTokens: 0, failure } });
		expect(answer.response).not.toBe("");
		const next = await waiting;
		expect(next).toMatchObject({ restored: { hitTokens: 0, failure }, saved: { failure } });
		expect(next.response).not.toBe("");
		await closing;
		session.dispose();
	});

	it("takes prompts one after the other, as the session does", async () => {
		const system = "The ferry costs forty crowns, a bicycle ten, and dogs are free of charge.";
		const options = { temperature: 0, maxTokens: 8 };
		const questions = [QUESTION, "And the ferry itself?"];
		const plain = engine.createSession((await newContext()).getSequence(), system);
		const expected = await Promise.all(questions.map((text) => plain.prompt(text, options)));
		plain.dispose();

		const { context, cache } = await newCache(await newServer());
		const session = engine.createSession(context.getSequence(), system);
		const reason = new Error("changed my mind");
		const [first = "", second = ""] = questions;
		const asked = [cache.prompt(session, first, options)];
		const controller = new AbortController();
		const left = cache.prompt(session, "Hello", { ...options, signal: controller.signal });
		asked.push(cache.prompt(session, second, options));
		controller.abort(reason);
		await expect(left).rejects.toBe(reason);
		const answers = await Promise.all(asked);
		expect(answers.map(({ response }) => response)).toEqual(expected);
		// The second goes on from the first one's answer: nothing was erased, or loaded, beside it.
		const ready = answers.map(({ restored }) => restored.readyTokens);
		expect(ready).toEqual([0, expect.toSatisfy((tokens: number) => tokens > CHUNK)]);
		session.dispose();
	});

	it("costs no more after a context shift than without the cache", async () => {
		const via = await newServer();
		const options = { temperature: 0, maxTokens: 4 };
		/** Tokens that each of some prompts evaluates. */
		const evaluated = async (cached: boolean) => {
			const { context, cache } = await newCache(via, { contextSize: 256 });
			const sequence = context.getSequence();
			const contextShift = { size: 130 };
			const session = engine.createSession(sequence, "You are a guide.", { contextShift });
			const counts: number[] = [];
			for (let i = 0; i < 9; i++) {
				const before = sequence.tokenMeter.usedInputTokens;
				const text = `Question ${i}: what is the price of the ferry, a bicycle, a dog, a horse and a cart?`;
				await (cached ? cache.prompt(session, text, options) : session.prompt(text, options));
				counts.push(sequence.tokenMeter.usedInputTokens - before);
			}
			session.dispose();
			return counts;
		};
		const alone = await evaluated(false);
		expect(Math.max(...alone.slice(1))).toBeGreaterThan(2 * (alone[1] as number)); // it has shifted
		const cached = await evaluated(true);
		for (const [i, count] of cached.entries()) {
			expect(count).toBeLessThanOrEqual(alone[i] as number);
		}
	});

	it("throws what the session throws", async () => {
		const { context, cache } = await newCache(await newServer());
		const session = engine.createSession(context.getSequence(), "Be brief.");
		const reason = new Error("changed my mind");
		const aborted = cache.prompt(session, QUESTION, { signal: AbortSignal.abort(reason) });
		await expect(aborted).rejects.toBe(reason);
		session.dispose();
	});
});

describe("trouble with the cache", () => {
	it("is told beside the result, and the answer is the same", async () => {
		await using server = await ServerProcess.start("--chunk-size", String(CHUNK));
		const client = await Client.connect({ url: server.url });
		handles.push(() => client.close());
		const { context, cache } = await newCache(client);
		server.process.kill("SIGKILL");

		const sequence = context.getSequence();
		const prompt = engine.tokens.slice(0, 70);
		const call = { timeoutMs: 500 };
		const restored = await cache.restore(sequence, prompt, call);
		expect(restored).toMatchObject(hit(0));
		expect(restored.failure?.code).toMatch(/^(TIMEOUT|UNREACHABLE)$/);
		expect(await complete(sequence, prompt)).toEqual(await control(prompt, 0));
		const saved = await cache.save(sequence, call);
		expect(saved).toMatchObject({ storedTokens: 0, bytes: 0 });
		expect(saved.failure?.code).toMatch(/^(TIMEOUT|UNREACHABLE)$/);
	});
});

describe("a server or a client that was closed", () => {
	it.each(["server", "client"])(
		"is told beside the result, and nothing is claimed: a %s",
		async (which) => {
			const server = await Server.start({ port: 0, memory: 2 ** 27, chunkSize: CHUNK });
			handles.push(() => server.close());
			const client = await Client.connect({ url: `tcp://${server.address}` });
			handles.push(() => client.close());
			const via = which === "server" ? server : client;
			const { context, cache } = await newCache(via, { sequences: 2 });
			const sequence = context.getSequence();
			const prompt = engine.tokens.slice(0, 70);
			await complete(sequence, prompt, 1);
			expect(await cache.save(sequence)).toMatchObject({ storedTokens: 64 });
			await via.close();
			const failure = { code: "CLOSED", message: expect.stringContaining(which) };
			expect(await cache.save(sequence)).toMatchObject({ storedTokens: 0, bytes: 0, failure });
			const other = context.getSequence();
			expect(await cache.restore(other, prompt)).toMatchObject({ ...hit(0), failure });
			const system = "The ferry costs forty crowns, a bicycle ten, and dogs are free of charge.";
			const session = engine.createSession(other, system);
			const question = "What does a bicycle cost?";
			const { response, saved } = await cache.prompt(session, question, { maxTokens: 4 });
			expect(response).not.toBe("");
			expect(saved).toMatchObject({ storedTokens: 0, failure });
			session.dispose();
		},
	);

	it("has what a sequence holds stored again by the next, once it is back", async () => {
		await using first = await ServerProcess.start("--chunk-size", String(CHUNK));
		const client = await Client.connect({ url: first.url });
		handles.push(() => client.close());
		const { context, cache } = await newCache(client);
		const sequence = context.getSequence();
		await complete(sequence, engine.tokens.slice(0, 70), 1);
		expect(await cache.save(sequence)).toMatchObject({ storedTokens: 64 });
		await first.kill();
		await expect.poll(() => client.connected).toBe(false);
		const lost = await cache.save(sequence);
		expect(lost).toMatchObject({ storedTokens: 0, failure: { code: "UNREACHABLE" } });
		const flags = ["--port", first.port, "--chunk-size", String(CHUNK)];
		await using _second = await ServerProcess.start(...flags);
		await expect.poll(() => client.connected, { timeout: 20_000 }).toBe(true);
		const again = await cache.save(sequence);
		expect(again.storedTokens).toBe(64);
		expect(again.bytes).toBeGreaterThan(0);
	});
});

describe("a call that its signal ends", () => {
	/** Files of states that this process holds in memory. */
	const files = () =>
		readdirSync("/proc/self/fd").filter((fd) => {
			try {
				return readlinkSync(`/proc/self/fd/${fd}`).includes("kvferry-state");
			} catch {
				return false; // closed meanwhile
			}
		}).length;

	const aborted = { code: "ABORTED" };

	it("changes nothing where it had ended before", async () => {
		const { context, cache } = await newCache(await newServer());
		const sequence = context.getSequence();
		await sequence.evaluateWithoutGeneratingNewTokens(engine.tokens.slice(0, 20));
		const signal = AbortSignal.abort();
		const other = engine.tokens.slice(100, 120);
		await expect(cache.restore(sequence, other, { signal })).rejects.toMatchObject(aborted);
		expect(sequence.nextTokenIndex).toBe(20);
		await expect(cache.save(sequence, { signal })).rejects.toMatchObject(aborted);
		await expect(cache.save(sequence, { signal: "x" as never })).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
		});
	});

	it("ends a prompt that waits for the cache, and leaves one that was answered its answer", async () => {
		await using server = await ServerProcess.start("--chunk-size", String(CHUNK));
		const client = await Client.connect({ url: server.url });
		handles.push(() => client.close());
		const { context, cache } = await newCache(client);
		const system = "The ferry costs forty crowns, a bicycle ten, and dogs are free of charge.";
		const sequence = context.getSequence();
		const session = engine.createSession(sequence, system);
		const timeoutMs = 60_000;
		await server.stop();
		const reason = new Error("changed my mind");
		const left = new AbortController();
		setTimeout(() => left.abort(reason), 100);
		const options = { signal: left.signal, maxTokens: 4, timeoutMs };
		await expect(cache.prompt(session, "What does it cost?", options)).rejects.toBe(reason);

		server.process.kill("SIGCONT");
		const stop = new AbortController();
		const save = sequence.saveStateToFile.bind(sequence);
		sequence.saveStateToFile = async (path) => {
			server.process.kill("SIGSTOP");
			setTimeout(() => stop.abort(reason), 100);
			return await save(path);
		};
		const { response, saved } = await cache.prompt(session, "What does it cost?", {
			signal: stop.signal,
			maxTokens: 4,
			timeoutMs,
		});
		expect(response).not.toBe("");
		expect(saved).toMatchObject({ storedTokens: 0, failure: aborted });
		await server.kill();
		session.dispose();
	});

	it("leaves no state in memory, though the store goes on", async () => {
		const before = files();
		await using server = await ServerProcess.start("--chunk-size", String(CHUNK));
		const client = await Client.connect({ url: server.url });
		handles.push(() => client.close());
		const { context, cache } = await newCache(client);
		const sequence = context.getSequence();
		await sequence.evaluateWithoutGeneratingNewTokens(engine.tokens.slice(0, 40));
		await server.stop();
		for (let i = 0; i < 4; i++) {
			const signal = AbortSignal.timeout(300);
			const saving = cache.save(sequence, { timeoutMs: 1_000, cacheSalt: `tenant${i}`, signal });
			await expect(saving).rejects.toMatchObject({ code: "ABORTED" });
		}
		expect(files()).toBeGreaterThan(before);
		await expect.poll(files, { timeout: 10_000 }).toBeLessThanOrEqual(before + 2); // for the next ones
		await server.kill();
		await cache.close();
		expect(files()).toBe(before);
	});
});

describe("a prompt shorter than a chunk", () => {
	it("is neither loaded nor stored, and that is no trouble", async () => {
		const { context, cache } = await newCache(await newServer());
		const sequence = context.getSequence();
		const prompt = engine.tokens.slice(0, CHUNK - 2);
		expect(await cache.restore(sequence, prompt)).toMatchObject({ hitTokens: 0 });
		await complete(sequence, prompt, 1);
		const { storedTokens, failure } = await cache.save(sequence);
		expect([storedTokens, failure]).toEqual([0, undefined]);
	});
});

describe("the identity", () => {
	it("is the text that kvferry doctor takes", async () => {
		const via = await newServer();
		await store(via, engine.tokens.slice(0, 40));
		const { cache } = await newCache(via);
		const { events } = await via.events();
		const { prompt } = doctorOptions(["--tokens", "f", "--identity", cache.identity]);
		expect(events.map(({ modelName }) => modelName)).toEqual([prompt?.modelName]);
	});

	it("is not that of a file which took the place of the loaded one", async () => {
		const directory = await mkdtemp(join(tmpdir(), "kvferry-test-"));
		handles.push(() => rm(directory, { recursive: true }));
		const paths = ["v1", "v2"].map((version) => join(directory, `${version}.gguf`));
		const [path = "", aside = ""] = paths;
		await copyFile(engine.modelPath, path);
		const { context, dispose } = await engine.createContextOf(path);
		handles.push(dispose);
		const via = await newServer();
		const unknown = {
			code: "IDENTITY_UNKNOWN",
			message: expect.stringMatching(/replaced.*`modelSha256`/),
		};
		for (const putAway of [rename, unlink]) {
			await putAway(path, aside);
			await writeFile(path, "other weights");
			await expect(openCache(context, via)).rejects.toMatchObject(unknown);
			await rename(aside, path).catch(() => {});
		}
		await openCache(context, via, { modelSha256: "0".repeat(64) });
	});
});

describe("a server that dies", () => {
	/** A cache at a server of its own that holds the state of two chunks, and a sequence to use it. */
	async function stored() {
		const server = await ServerProcess.start("--chunk-size", String(CHUNK));
		handles.push(() => server[Symbol.asyncDispose]());
		const client = await Client.connect({ url: server.url });
		handles.push(() => client.close());
		const { context, cache } = await newCache(client, { sequences: 2 });
		const prompt = engine.tokens.slice(0, 2 * CHUNK + 6);
		const first = context.getSequence();
		await complete(first, prompt, 1);
		expect(await cache.save(first)).toMatchObject({ storedTokens: 2 * CHUNK });
		return { server, cache, prompt, sequence: context.getSequence() };
	}

	it("during the lookup costs the hit, not the answer", async () => {
		const { server, cache, prompt, sequence } = await stored();
		await server.stop();
		const restoring = cache.restore(sequence, prompt, { timeoutMs: 10_000 });
		await server.kill();
		const restored = await restoring;
		expect(restored).toMatchObject(hit(0));
		expect(restored.failure?.code).toBe("UNREACHABLE");
		expect(await complete(sequence, prompt)).toEqual(await control(prompt, 0));
	});

	it("during the load changes nothing", async () => {
		const { server, cache, prompt, sequence } = await stored();
		const load = sequence.loadStateFromFile.bind(sequence);
		sequence.loadStateFromFile = async (path, options) => {
			await server.kill();
			return await load(path, options);
		};
		expect(await cache.restore(sequence, prompt)).toMatchObject(hit(2 * CHUNK));
		expect(await complete(sequence, prompt)).toEqual(await control(prompt, 2 * CHUNK));
	});

	it("during the store is told, and the sequence goes on", async () => {
		const { server, cache, prompt, sequence } = await stored();
		const other = prompt.slice().reverse();
		await complete(sequence, other, 1);
		const save = sequence.saveStateToFile.bind(sequence);
		sequence.saveStateToFile = async (path) => {
			await server.kill();
			return await save(path);
		};
		const saved = await cache.save(sequence, { timeoutMs: 2_000 });
		expect(saved).toMatchObject({ storedTokens: 0, bytes: 0 });
		expect(saved.failure?.code).toMatch(/^(TIMEOUT|UNREACHABLE)$/);
		await sequence.clearHistory();
		expect(await complete(sequence, prompt)).toEqual(await control(prompt, 0));
	});

	it("is no worse than bytes that change: the engine never sees them", async () => {
		const { server, cache, prompt, sequence } = await stored();
		// What the engine answers on the first chunk alone.
		expect(await cache.restore(sequence, prompt.slice(0, CHUNK + 1))).toMatchObject(hit(CHUNK));
		const expected = await complete(sequence, prompt);
		await sequence.clearHistory();
		const path = `/dev/shm/${server.shmName}`;
		const pool = await readFile(path);
		const second = pool.indexOf("KVFY", pool.indexOf("KVFY") + 4);
		const at = second + 5_000;
		const file = await open(path, "r+");
		await file.write(Buffer.from([(pool[at] ?? 0) ^ 0x40]), 0, 1, at);
		await file.close();
		expect(await cache.restore(sequence, prompt)).toMatchObject(hit(CHUNK));
		expect(await complete(sequence, prompt)).toEqual(expected);
		await expect.poll(() => cache.damagedChunks).toBe(1);
	});
});

describe("misuse", () => {
	it("is thrown, with what to do", async () => {
		const via = await newServer();
		const { context, cache } = await newCache(via);
		const sequence = context.getSequence();
		const code = (expected: string) => expect.objectContaining({ code: expected });
		const elsewhere = (await newContext()).getSequence();
		await expect(cache.restore(elsewhere, [1])).rejects.toEqual(code("INVALID_ARGUMENT"));
		await expect(cache.restore(sequence, [1, 0.5])).rejects.toEqual(code("INVALID_TOKEN"));
		await expect(cache.restore(sequence, [1, -1])).rejects.toEqual(code("INVALID_TOKEN"));
		await expect(cache.restore(sequence, [2 ** 31])).rejects.toEqual(code("INVALID_TOKEN"));
		await expect(cache.save(sequence, { timeoutMs: 0 })).rejects.toEqual(code("INVALID_ARGUMENT"));
		const prompt = engine.tokens.slice(0, 40);
		await expect(cache.restore(sequence, prompt, { cacheSalt: "a@b" })).rejects.toEqual(
			code("INVALID_SALT"),
		);
		await expect(cache.restore(sequence, prompt, { signal: AbortSignal.abort() })).rejects.toEqual(
			code("ABORTED"),
		);
		const misspelt = { cache_salt: "acme" } as object;
		const missing: [Promise<unknown>, RegExp][] = [
			[cache.prompt(undefined as never, "Hello"), /^session is missing: give a LlamaChatSession/],
			[cache.prompt({ sequence } as never, 7 as never), /^text is 7: give the user's message/],
			[cache.restore(undefined as never, [1]), /^sequence is missing: give context.getSequence/],
			[cache.restore(sequence, undefined as never), /^tokens is missing: give an array/],
			[
				cache.restore(sequence, [1], misspelt),
				/^restore has no option "cache_salt": did you mean cacheSalt/,
			],
			[cache.save(sequence, misspelt), /^save has no option "cache_salt": did you mean cacheSalt/],
			[
				cache.prompt({ sequence } as never, "", misspelt as never),
				/^prompt has no option "cache_salt": did you mean cacheSalt/,
			],
		];
		for (const [call, message] of missing) {
			await expect(call).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: expect.stringMatching(message),
			});
		}
		await sequence.dispose();
		await expect(cache.save(sequence)).rejects.toEqual(code("INVALID_ARGUMENT"));
		await cache.close();
		await cache.close();
		await expect(cache.save(context.getSequence())).rejects.toEqual(code("CLOSED"));
	});

	it("may be left before it is there, at no cost to the context", async () => {
		const via = await newServer();
		const context = await newContext();
		const left = context.sequencesLeft;
		const signal = AbortSignal.abort();
		await expect(openCache(context, via, { signal })).rejects.toMatchObject({ code: "ABORTED" });
		vi.stubEnv("TMPDIR", "/nonexistent");
		await expect(openCache(context, via)).rejects.toMatchObject({
			code: "SYSTEM",
			message: expect.stringMatching(/\/nonexistent.*TMPDIR/),
		});
		vi.unstubAllEnvs();
		expect(context.sequencesLeft).toBe(left);
	});

	it("of a context whose sequences are all taken is told, unless an empty one is passed", async () => {
		const via = await newServer();
		const context = await newContext();
		const sequence = context.getSequence();
		const refused = expect.objectContaining({ code: "INVALID_ARGUMENT" });
		await expect(openCache(context, via)).rejects.toEqual(refused);
		await complete(sequence, engine.tokens.slice(0, 4), 1);
		await expect(openCache(context, via, { sequence })).rejects.toEqual(refused);
		await sequence.clearHistory();
		const elsewhere = (await newContext()).getSequence();
		for (const [given, message] of [
			[
				{ modelpath: "m" },
				'LlamaPrefixCache.open has no option "modelpath": did you mean modelPath?',
			],
			[
				{ via: "tcp://127.0.0.1:5555" },
				'via is "tcp://127.0.0.1:5555": give await Client.connect(',
			],
			[{ via: Promise.resolve(via) }, "via is a promise, await it: "],
			[{ via: undefined }, "via is missing: "],
			[{ sequence: elsewhere }, "the sequence is of another context: "],
			[{ context: undefined }, "context is missing: give await model.createContext()"],
			[{ context: newContext() }, "context is a promise, await it: "],
		] as const) {
			await expect(openCache(context, via, given as object)).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(message),
			});
		}
		const cache = await openCache(context, via, { sequence });
		expect(sequence.nextTokenIndex).toBe(0);
		expect(await cache.restore(sequence, engine.tokens.slice(0, 40))).toMatchObject(hit(0));
	});
});
