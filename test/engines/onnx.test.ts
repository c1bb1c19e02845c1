// What the cache does with tensors, without an engine; onnx-engines.test.ts has the engines.

import { setImmediate } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import { doctorOptions } from "../../ts/cli/options.js";
import { Client } from "../../ts/client.js";
import {
	type EngineTensor,
	type GenerateOptions,
	type LoadResult,
	OnnxPrefixCache,
	type OnnxPrefixCacheOptions,
} from "../../ts/engines/onnx.js";
import { Server } from "../../ts/server.js";
import { ServerProcess } from "../server-process.js";
import { FakeTensor, presentOf, sessionOf } from "./onnx-sessions.js";

const CHUNK = 32;
const LAYERS = 3;
const LAYOUT = { kvHeads: 2, headSize: 24, dtype: "float32" } as const;
const session = sessionOf(LAYERS, LAYOUT);

/** Chunks of 4 MiB: copied in several goes. */
const WIDE = { kvHeads: 64, headSize: 128, dtype: "float32" } as const;
const wide = sessionOf(2, WIDE);

const handles: (() => Promise<unknown>)[] = [];

afterEach(async () => {
	for (const close of handles.splice(0).reverse()) {
		await close();
	}
});

async function newServer(memory = 2 ** 27): Promise<Server> {
	const server = await Server.start({ listen: false, memory, chunkSize: CHUNK });
	handles.push(() => server.close());
	return server;
}

async function openCache(
	via: Client | Server,
	options: Partial<OnnxPrefixCacheOptions<FakeTensor>> = {},
): Promise<OnnxPrefixCache<FakeTensor>> {
	const cache = await OnnxPrefixCache.open({
		...{ session, Tensor: FakeTensor, modelId: "model", via },
		...options,
	});
	handles.push(() => cache.close());
	return cache;
}

/** `count` tokens that begin with `first`. */
function tokens(count: number, first = 0): number[] {
	return Array.from({ length: count }, (_, at) => first + at);
}

/** The tensors of `count` tokens, as load gives them. */
function feedsOf(count: number, of = session, layout: typeof LAYOUT | typeof WIDE = LAYOUT) {
	const entries = Object.entries(presentOf(of, layout, count));
	return Object.fromEntries(
		entries.map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor]),
	);
}

const hit = (hitTokens: number): Partial<LoadResult> => ({ hitTokens });
const code = (expected: string) => expect.objectContaining({ code: expected });

describe("a stored prompt", () => {
	it.each(["float32", "float16"] as const)("is given back as tensors of %s", async (dtype) => {
		const via = await newServer();
		const layout = { ...LAYOUT, dtype };
		const of = sessionOf(LAYERS, layout);
		const cache = await openCache(via, { session: of });
		const saved = await cache.save(tokens(100), presentOf(of, layout, 100));
		const chunkBytes = LAYERS * 2 * 2 * CHUNK * 24 * (dtype === "float32" ? 4 : 2);
		expect(saved).toMatchObject({ storedTokens: 96, bytes: 3 * chunkBytes, refusedTokens: 0 });

		const loaded = await cache.load(BigInt64Array.from(tokens(100), BigInt));
		expect(loaded).toMatchObject({ hitTokens: 96, bytes: 3 * chunkBytes });
		const feeds = Object.entries(feedsOf(96)).map(([name, { data, dims }]) => {
			const elements = dtype === "float16" ? Uint16Array.from(data) : data;
			return [name, new FakeTensor(dtype, elements, dims)];
		});
		expect(loaded.feeds).toEqual(Object.fromEntries(feeds));
	});

	it("serves every prompt that begins like it, and leaves one token to be evaluated", async () => {
		const cache = await openCache(await newServer());
		await cache.save(tokens(101), presentOf(session, LAYOUT, 100)); // one was not evaluated
		expect(await cache.load([...tokens(70), ...tokens(30, 500)])).toMatchObject(hit(64));
		expect(await cache.load(tokens(96))).toMatchObject(hit(64));
		expect(await cache.load(tokens(97))).toMatchObject(hit(96));
		const { feeds, hitTokens, failure } = await cache.load(tokens(50, 500));
		expect({ hitTokens, failure }).toEqual({ hitTokens: 0, failure: undefined });
		expect(feeds).toEqual(feedsOf(0));
		expect(await cache.load([])).toMatchObject(hit(0));
	});

	it("grows by what is new, and is not loaded beside what the caller has", async () => {
		const via = await newServer();
		const cache = await openCache(via);
		const first = await cache.save(tokens(70), presentOf(session, LAYOUT, 70));
		const second = await cache.save(tokens(140), feedsOf(140));
		expect([first.storedTokens, second.storedTokens]).toEqual([64, 128]);
		expect(second.bytes).toBe(first.bytes);
		expect(await cache.save(tokens(140), feedsOf(140))).toMatchObject({
			...{ storedTokens: 128, bytes: 0 },
		});
		expect((await cache.load(tokens(140))).feeds).toEqual(feedsOf(128));
		const own = await cache.load(tokens(140), { beyond: 128 });
		expect(own).toMatchObject({ hitTokens: 0, bytes: 0 });
		expect(await cache.load(tokens(140), { beyond: 127 })).toMatchObject(hit(128));
		await expect.poll(() => via.status()).toMatchObject({ leases: 0, slots_reading: 0 });
	});

	it("is no hit for another tenant, model, engine or shape", async () => {
		const via = await newServer();
		const cache = await openCache(via, { cacheSalt: "tenant" });
		await cache.save(tokens(40), presentOf(session, LAYOUT, 40));
		expect(await cache.load(tokens(40))).toMatchObject(hit(32));
		expect(await cache.load(tokens(40), { cacheSalt: "other" })).toMatchObject(hit(0));
		expect(await cache.load(tokens(40), { cacheSalt: undefined })).toMatchObject(hit(32));
		expect(await cache.load(tokens(40), { cacheSalt: null })).toMatchObject(hit(0));
		expect(await cache.load(tokens(40), { cacheSalt: "" })).toMatchObject(hit(0));
		for (const options of [
			{ modelId: "another" },
			{ engine: "cuda" },
			{ session: sessionOf(LAYERS, { ...LAYOUT, dtype: "float16" }) },
			{ session: sessionOf(LAYERS, { ...LAYOUT, kvHeads: 24, headSize: 2 }) },
		]) {
			const other = await openCache(via, { ...options, cacheSalt: "tenant" });
			expect(await other.load(tokens(40))).toMatchObject(hit(0));
		}
		const same = await openCache(via, { cacheSalt: "tenant" });
		expect(await same.load(tokens(40))).toMatchObject(hit(32));
	});

	it("that has no room is stored as far as there is some, and that is said", async () => {
		const chunkBytes = LAYERS * 2 * 2 * CHUNK * 24 * 4;
		const via = await newServer(3 * Math.ceil((chunkBytes + 64) / 4096) * 4096);
		const cache = await openCache(via);
		const saved = await cache.save(tokens(160), presentOf(session, LAYOUT, 160));
		expect(saved).toMatchObject({ storedTokens: 96, refusedTokens: 64 });
	});
});

describe("large tensors", () => {
	const PROMPT = 4 * CHUNK + 1;

	const busy = (via: Server, slots: "slots_reading" | "slots_writing") =>
		Number(via.status()[slots]) > 0;

	/** Waits, a turn of the event loop at a time, until `begun`, and one turn more. */
	async function turns(begun: () => boolean): Promise<void> {
		while (!begun()) {
			await setImmediate();
		}
		await setImmediate();
	}

	it("are copied in several goes, between which the event loop turns", async () => {
		const via = await newServer();
		const cache = await openCache(via, { session: wide });
		let count = 0;
		let open = true;
		const watch = async () => {
			while (open) {
				await setImmediate();
				count += busy(via, "slots_reading") || busy(via, "slots_writing") ? 1 : 0;
			}
		};
		const watching = watch();
		await cache.save(tokens(PROMPT), presentOf(wide, WIDE, PROMPT));
		const stored = count;
		const { feeds } = await cache.load(tokens(PROMPT));
		open = false;
		await watching;
		for (const [name, { data }] of Object.entries(feedsOf(4 * CHUNK, wide, WIDE))) {
			const loaded = feeds[name]?.data as Float32Array;
			expect(Buffer.from(loaded.buffer).equals(Buffer.from(data.buffer)), name).toBe(true);
		}
		expect(stored).toBeGreaterThan(2);
		expect(count - stored).toBeGreaterThan(2);
	});

	it("are let go of when the signal aborts in the middle", async () => {
		const via = await newServer();
		const cache = await openCache(via, { session: wide });
		const present = presentOf(wide, WIDE, PROMPT);
		const storing = new AbortController();
		const saving = cache.save(tokens(PROMPT), present, { signal: storing.signal });
		const [saved] = await Promise.allSettled([
			saving,
			turns(() => busy(via, "slots_writing")).then(() => storing.abort()),
		]);
		expect(saved).toMatchObject({ status: "rejected", reason: code("ABORTED") });
		await expect.poll(() => via.status()).toMatchObject({ objects: 0, slots_writing: 0 });

		await cache.save(tokens(PROMPT), present);
		const reading = new AbortController();
		const loading = cache.load(tokens(PROMPT), { signal: reading.signal });
		const [loaded] = await Promise.allSettled([
			loading,
			turns(() => busy(via, "slots_reading")).then(() => reading.abort()),
		]);
		expect(loaded).toMatchObject({ status: "rejected", reason: code("ABORTED") });
		await expect
			.poll(() => via.status())
			.toMatchObject({ leases: 0, slots_reading: 0, objects: 4 });
		expect(await cache.load(tokens(PROMPT))).toMatchObject(hit(4 * CHUNK));
	});

	it("that are transferred in the middle are not stored", async () => {
		const via = await newServer();
		const cache = await openCache(via, { session: wide });
		const present = presentOf(wide, WIDE, PROMPT);
		const transfer = () => {
			structuredClone(null, { transfer: [present["present.1.value"]?.data.buffer as ArrayBuffer] });
		};
		const [saved] = await Promise.allSettled([
			cache.save(tokens(PROMPT), present),
			turns(() => busy(via, "slots_writing")).then(transfer),
		]);
		expect(saved).toMatchObject({ status: "rejected", reason: code("INVALID_ARGUMENT") });
		expect(via.status()).toMatchObject({ objects: 0, slots_writing: 0 });
	});
});

describe("generate", () => {
	/** What a model of transformers.js is asked, and gives: the prompt, two tokens more, and all but the last's KV. */
	class FakeModel {
		readonly sessions = { model: session };
		readonly asked: { past_key_values: Past; [option: string]: unknown }[] = [];
		location = "cpu";

		async generate(options: { input_ids: EngineTensor; past_key_values: Past }) {
			this.asked.push(options);
			const sequence = [...(options.input_ids.data as BigInt64Array), 7n, 8n];
			const present = Object.entries(presentOf(session, LAYOUT, sequence.length - 1));
			const held = present.map(([name, tensor]) => [
				name.replace("present", "past_key_values"),
				{ ...tensor, location: this.location },
			]);
			return { sequences: int64(sequence), past_key_values: Object.fromEntries(held) };
		}
	}
	class Past {
		constructor(readonly entries?: Record<string, FakeTensor>) {}
	}
	const int64 = (values: bigint[]): EngineTensor => ({
		...{ type: "int64", data: BigInt64Array.from(values), dims: [1, values.length] },
		location: "cpu",
	});
	const prompt = int64(tokens(95).map(BigInt));
	const mask = int64(new Array(95).fill(1n));

	async function newModel() {
		const model = new FakeModel();
		const options = { session: undefined, model, DynamicCache: Past };
		return { model, cache: await openCache(await newServer(), options) };
	}

	it("has the model go on behind what is stored, and stores what it computed", async () => {
		const { model, cache } = await newModel();
		const first = await cache.generate({ input_ids: prompt, cacheSalt: "tenant", max_length: 5 });
		expect(first).toMatchObject({ loaded: { hitTokens: 0 }, saved: { storedTokens: 96 } });
		expect(first.sequences.dims).toEqual([1, 97]);
		const second = await cache.generate({ input_ids: prompt, cacheSalt: "tenant" });
		expect(second).toMatchObject({ loaded: { hitTokens: 64 }, saved: { bytes: 0 } });
		const [cold, warm] = model.asked;
		expect(cold).toEqual({
			...{ input_ids: prompt, attention_mask: mask, max_length: 5, return_dict_in_generate: true },
			past_key_values: new Past(undefined),
		});
		expect(warm?.past_key_values.entries).toEqual(feedsOf(64));
		expect(await cache.generate({ input_ids: prompt, attention_mask: mask })).toMatchObject({
			loaded: { hitTokens: 0 },
		});
		await expect(
			cache.generate({ input_ids: prompt, cache_salt: "tenant" } as never),
		).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: 'generate has no option "cache_salt": did you mean cacheSalt?',
		});
	});

	it("gives what was computed, even where it cannot be stored", async () => {
		const { model, cache } = await newModel();
		model.location = "gpu-buffer";
		const { sequences, saved } = await cache.generate({ input_ids: prompt });
		expect(sequences.dims).toEqual([1, 97]);
		expect(saved).toMatchObject({ storedTokens: 0, failure: { code: "INVALID_ARGUMENT" } });
	});

	it("ends with its signal, beside what the caller stops it by", async () => {
		const { model, cache } = await newModel();
		type Criterion = (sequences: bigint[][]) => boolean[];
		const own: Criterion = (sequences) => sequences.map(() => false);
		const list = { [Symbol.iterator]: () => [own][Symbol.iterator]() }; // as StoppingCriteriaList
		const generate = model.generate.bind(model);
		for (const stopping_criteria of [undefined, null, own, [own], list]) {
			const controller = new AbortController();
			const { signal } = controller;
			const stopped: boolean[][] = [];
			model.generate = async (options) => {
				const criteria = Reflect.get(options, "stopping_criteria") as Criterion[];
				const ask = () => stopped.push(criteria.flatMap((criterion) => criterion([[7n]])));
				ask();
				controller.abort();
				ask();
				return await generate(options);
			};
			const generating = cache.generate({ input_ids: prompt, signal, stopping_criteria });
			await expect(generating).rejects.toEqual(code("ABORTED"));
			const others = stopping_criteria ? [false] : [];
			expect(stopped).toEqual([
				[...others, false],
				[...others, true],
			]);
		}
		expect(model.asked).toHaveLength(5);
		const signal = AbortSignal.abort();
		const late = cache.generate({ input_ids: prompt, signal });
		await expect(late).rejects.toEqual(code("ABORTED"));
		expect(model.asked).toHaveLength(5);
		expect(model.asked[0]).not.toHaveProperty("signal");
	});

	it("refuses prompts whose tokens do not tell their KV", async () => {
		const { model, cache } = await newModel();
		const refused = async (options: Partial<GenerateOptions>, reason: RegExp) => {
			const inputs = { input_ids: prompt, ...options };
			await expect(cache.generate(inputs)).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: expect.stringMatching(reason),
			});
		};
		await refused({ attention_mask: int64([0n, ...tokens(94).map(() => 1n)]) }, /without padding/);
		await refused({ attention_mask: int64([1n, 1n]) }, /for 2 tokens and input_ids has 95/);
		await refused({ attention_mask: "1" as never }, /attention_mask must be an object/);
		await refused({ past_key_values: {} }, /leave them out/);
		await refused({ input_ids: { ...prompt, dims: [5, 19] } }, /int64 \[5,19\]/);
		await refused({ input_ids: undefined as unknown as EngineTensor }, /input_ids must be/);
		await refused({ input_ids: {} as EngineTensor }, /must be an int64 tensor/);
		for (const options of [undefined, null, "a text"]) {
			await expect(cache.generate(options as never)).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: "the options of generate must be an object",
			});
		}
		expect(model.asked).toEqual([]);
	});
});

describe("trouble with the cache", () => {
	it("is told beside the result, and the prompt can be evaluated", async () => {
		const server = await ServerProcess.start("--chunk-size", String(CHUNK));
		handles.push(() => server[Symbol.asyncDispose]());
		const client = await Client.connect({ url: server.url });
		handles.push(() => client.close());
		const cache = await openCache(client);
		await server.kill();
		const call = { timeoutMs: 500 };
		const loaded = await cache.load(tokens(70), call);
		expect(loaded).toMatchObject(hit(0));
		expect(loaded.failure?.code).toMatch(/^(TIMEOUT|UNREACHABLE)$/);
		expect(loaded.feeds).toEqual(feedsOf(0));
		const saved = await cache.save(tokens(70), presentOf(session, LAYOUT, 70), call);
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
			const cache = await openCache(via);
			const present = presentOf(session, LAYOUT, 70);
			expect(await cache.save(tokens(70), present)).toMatchObject({ storedTokens: 64 });
			await via.close();
			const failure = { code: "CLOSED", message: expect.stringContaining(which) };
			expect(await cache.load(tokens(70))).toMatchObject({ hitTokens: 0, failure });
			expect(await cache.save(tokens(70), present)).toMatchObject({ storedTokens: 0, failure });
		},
	);
});

describe("the identity", () => {
	it("is the text that kvferry doctor takes", async () => {
		const via = await newServer();
		const cache = await openCache(via);
		await cache.save(tokens(40), presentOf(session, LAYOUT, 40));
		const { events } = await via.events();
		const { prompt } = doctorOptions(["--tokens", "f", "--identity", cache.identity]);
		expect(events.map(({ modelName }) => modelName)).toEqual([prompt?.modelName]);
		expect((await openCache(via)).identity).toBe(cache.identity);
		expect((await openCache(via, { modelId: "another" })).identity).not.toBe(cache.identity);
	});
});

describe("misuse", () => {
	it("is thrown, with what to do", async () => {
		const via = await newServer();
		const cache = await openCache(via);
		const present = presentOf(session, LAYOUT, 70);
		await expect(cache.load([1, 0.5])).rejects.toEqual(code("INVALID_TOKEN"));
		await expect(cache.load([1n, -1n])).rejects.toEqual(code("INVALID_TOKEN"));
		await expect(cache.load([2 ** 31])).rejects.toEqual(code("INVALID_TOKEN"));
		for (const [token, message] of [
			[null, "null"],
			["", '""'],
			["7", '"7"'],
			[[], "of type object"],
			[false, "of type boolean"],
			[undefined, "missing"],
			[Symbol("token"), "of type symbol"],
			[-1n, "-1"],
		] as const) {
			await expect(cache.load([0, token] as never), message).rejects.toMatchObject({
				code: "INVALID_TOKEN",
				message: `Token 1 is ${message}: tokens are integers from 0 to 2147483647.`,
			});
		}
		await expect(cache.load("a text" as never)).rejects.toThrow(
			/^tokens is "a text": give an array/,
		);
		await expect(cache.load(tokens(70), { timeoutMs: 0 })).rejects.toEqual(
			code("INVALID_ARGUMENT"),
		);
		await expect(cache.load(tokens(70), { beyond: -1 })).rejects.toEqual(code("INVALID_ARGUMENT"));
		await expect(cache.load(tokens(70), { cacheSalt: "a@b" })).rejects.toEqual(
			code("INVALID_SALT"),
		);
		const misspelt = { cache_salt: "acme" } as object;
		for (const [of, call] of [
			["load", cache.load(tokens(70), misspelt)],
			["save", cache.save(tokens(70), present, misspelt)],
		] as const) {
			await expect(call).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: `${of} has no option "cache_salt": did you mean cacheSalt?`,
			});
		}
		const signal = AbortSignal.abort();
		await expect(cache.load(tokens(70), { signal })).rejects.toEqual(code("ABORTED"));
		await expect(cache.save(tokens(70), present, { signal })).rejects.toEqual(code("ABORTED"));
		await expect(
			cache.generate({ input_ids: present["present.0.key"] as FakeTensor }),
		).rejects.toThrow(/`model` and `DynamicCache`/);
		await cache.close();
		await cache.close();
		await expect(cache.load(tokens(70))).rejects.toEqual(code("CLOSED"));
		await expect(cache.save(tokens(70), present)).rejects.toEqual(code("CLOSED"));
	});

	it("of an open is told", async () => {
		const via = await newServer();
		const refused = code("INVALID_ARGUMENT");
		for (const [given, message] of [
			[
				{ modelpath: "m" },
				'OnnxPrefixCache.open has no option "modelpath": did you mean modelPath?',
			],
			[
				{ via: "tcp://127.0.0.1:5555" },
				'via is "tcp://127.0.0.1:5555": give await Client.connect(',
			],
			[{ via: Promise.resolve(via) }, "via is a promise, await it: "],
			[{ via: undefined }, "via is missing: "],
		] as const) {
			await expect(openCache(via, given as object)).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(message),
			});
		}
		await expect(openCache(via, { session: undefined })).rejects.toEqual(refused);
		await expect(openCache(via, { layout: null as never })).rejects.toThrow(/^layout must be/);
		const silent = { ...session, inputMetadata: {} as never };
		await expect(openCache(via, { session: silent })).rejects.toEqual(code("IDENTITY_UNKNOWN"));
		await openCache(via, { session: silent, layout: LAYOUT });
		await expect(openCache(via, { Tensor: {} as typeof FakeTensor })).rejects.toEqual(refused);
		await expect(openCache(via, { cacheSalt: "\ud800" })).rejects.toEqual(code("INVALID_SALT"));
		await expect(openCache(via, { session: sessionOf(0, LAYOUT) })).rejects.toEqual(
			code("UNSUPPORTED_MODEL"),
		);
	});

	it("of tensors moves no byte", async () => {
		const via = await newServer();
		const cache = await openCache(via);
		const refused = async (given: number, change: Record<string, unknown>, reason: RegExp) => {
			const outputs = { ...presentOf(session, LAYOUT, 70), ...change };
			await expect(cache.save(tokens(given), outputs)).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: expect.stringMatching(reason),
			});
		};
		const float = (dims: number[], elements = 2 * 70 * 24) =>
			new FakeTensor("float32", new Float32Array(elements), dims);
		const detached = float([1, 2, 70, 24]);
		structuredClone(null, { transfer: [detached.data.buffer as ArrayBuffer] });
		await refused(69, {}, /hold 70 tokens and 69 were given/);
		await refused(72, {}, /hold 70 tokens and 72 were given/);
		for (const [tensor, reason] of [
			[undefined, /neither present.1.key nor past_key_values.1.key/],
			[null, /present.1.key is null: it must be the engine's tensor/],
			[{}, /present.1.key is of type object: it must be/],
			[float([1, 70, 2, 24]), /\[1,70,2,24\]: it must be float32 \[1, 2, tokens, 24\]/],
			[float([2, 2, 70, 24], 2 * 2 * 70 * 24), /batch of 2/],
			[float([2, 70, 24]), /it must be/],
			[float([1, 2, 64, 24], 2 * 64 * 24), /holds 64 tokens and others 70.*sliding window/],
			[float([1, 2, 70, 24], 2 * 70 * 23), /does not have 13440 bytes/],
			[detached, /does not have 13440 bytes/],
			[new FakeTensor("float16", new Uint16Array(2 * 70 * 24), [1, 2, 70, 24]), /is float16/],
			[{ ...float([1, 2, 70, 24]), location: "gpu-buffer" }, /lies in a gpu-buffer/],
			[{ ...float([1, 2, 70, 24], 1), location: null }, /does not have 13440 bytes/],
		] as const) {
			await refused(70, { "present.1.key": tensor }, reason);
		}
		expect(via.status()).toMatchObject({ objects: 0, slots_writing: 0 });
	});
});
