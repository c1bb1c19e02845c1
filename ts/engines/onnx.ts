/**
 * A KV cache for onnxruntime and transformers.js that outlives requests and processes.
 *
 * @packageDocumentation
 */
import { setImmediate } from "node:timers/promises";
import { types } from "node:util";
import {
	checkInteger,
	checkObject,
	checkOptions,
	checkSalt,
	checkVia,
	invalid,
} from "../arguments.js";
import { PrefixCache, REQUEST_OPTIONS, type RequestOptions } from "../cache.js";
import type { Client } from "../client.js";
import { type ErrorCode, ErrorCodes, fromNative, KvferryError, wrap } from "../errors.js";
import { native } from "../native.js";
import type { KvTensors, PrefixReading, PrefixWriting } from "../native-binding.js";
import type { Server } from "../server.js";
import { throwIfAborted, timeoutOf, type WaitOptions, waitFor } from "../waiting.js";
import { type Call, Calls, checkSpelling, toTokenIds, troubleOf } from "./calls.js";
import { identityOf, type OnnxIdentityOptions } from "./onnx-identity.js";
import {
	bytesOf,
	type Held,
	heldBy,
	type KvLayout,
	layoutOf,
	newData,
	type OnnxLayout,
} from "./onnx-layout.js";
import type {
	EngineDynamicCache,
	EngineModel,
	EngineSession,
	EngineTensor,
	EngineTensorClass,
	EngineValue,
} from "./onnxruntime.js";

export {
	type EngineDynamicCache,
	type EngineModel,
	type EngineSession,
	type EngineTensor,
	type EngineTensorClass,
	type EngineValue,
	type ErrorCode,
	ErrorCodes,
	KvferryError,
	type OnnxIdentityOptions,
	type OnnxLayout,
	type RequestOptions,
	type WaitOptions,
};

/** How an {@link OnnxPrefixCache} is set up: with a `session`, or with a `model` of transformers.js. */
export interface OnnxPrefixCacheOptions<T extends EngineTensor = EngineTensor>
	extends OnnxIdentityOptions,
		RequestOptions {
	/** onnxruntime's session of a model with `past_key_values` inputs. */
	readonly session?: EngineSession | undefined;
	/** transformers.js's model, in place of a session. */
	readonly model?: EngineModel | undefined;
	/** The engine's own class `Tensor`: onnxruntime's with a session, transformers.js's with a model. */
	readonly Tensor: EngineTensorClass<T>;
	/** The class of transformers.js; {@link OnnxPrefixCache.generate} needs it. */
	readonly DynamicCache?: EngineDynamicCache | undefined;
	/** Where the cache is: a server in another process, or one in this process. */
	readonly via: Client | Server;
	/** Sizes of the KV tensors. Needed only where the session's metadata does not tell them. */
	readonly layout?: OnnxLayout | undefined;
}

const OPTIONS = {
	session: true,
	model: true,
	Tensor: true,
	DynamicCache: true,
	via: true,
	layout: true,
	modelPath: true,
	modelId: true,
	engine: true,
	cacheSalt: true,
	signal: true,
	timeoutMs: true,
} satisfies Record<keyof OnnxPrefixCacheOptions, true>;

/** Options of one {@link OnnxPrefixCache.load}. */
export interface LoadOptions extends RequestOptions {
	/**
	 * Leading tokens whose tensors the caller has already: nothing is loaded unless the cache has more. Default 0.
	 */
	readonly beyond?: number | undefined;
}

const LOAD_OPTIONS = {
	...REQUEST_OPTIONS,
	beyond: true,
} satisfies Record<keyof LoadOptions, true>;

/** What {@link OnnxPrefixCache.load} found. */
export interface LoadResult<T extends EngineTensor = EngineTensor> {
	/**
	 * Leading tokens whose KV was loaded, in whole chunks of {@link OnnxPrefixCache.chunkSize}: always 0 for a prompt that is
	 * no longer than one. The others are to be evaluated.
	 */
	readonly hitTokens: number;
	/**
	 * `past_key_values.*` of these tokens (of none when nothing was loaded), to be fed with the other tokens. They
	 * are the caller's.
	 */
	readonly feeds: Record<string, T>;
	/** Bytes that came from the cache. */
	readonly bytes: number;
	/** Time that the call took, in milliseconds. */
	readonly durationMs: number;
	/** How much of it went by until the cache had answered; 0 when it was not asked or did not. */
	readonly lookupMs: number;
	/** Why nothing was loaded, when that was trouble and no plain miss. */
	readonly failure?: KvferryError;
}

/** What {@link OnnxPrefixCache.save} did. */
export interface SaveResult {
	/**
	 * Leading tokens that the cache holds now, in whole chunks of {@link OnnxPrefixCache.chunkSize}: always 0 for what is
	 * shorter than one, and 0 with a failure.
	 */
	readonly storedTokens: number;
	/** Bytes that went to the cache; 0 when it had them already. */
	readonly bytes: number;
	/** Tokens for which the cache had no room; 0 when the server does not say. */
	readonly refusedTokens: number;
	/** Time that the call took, in milliseconds. */
	readonly durationMs: number;
	/** Why less was stored than could be, when that was trouble. */
	readonly failure?: KvferryError;
}

/** What {@link OnnxPrefixCache.generate} returns. */
export interface GenerateResult<T extends EngineTensor = EngineTensor> {
	/** The prompt's tokens and the generated ones, int64 [1, tokens]. */
	readonly sequences: T;
	/** What was loaded before. */
	readonly loaded: Omit<LoadResult<T>, "feeds">;
	/** What was stored after. */
	readonly saved: SaveResult;
}

/** Inputs of a prompt, as a tokenizer of transformers.js gives them, and options of `model.generate`. */
export interface GenerateOptions extends RequestOptions {
	/**
	 * Ends the call with `ABORTED`: while it loads at once, then with the next token. Once all is generated, it ends only
	 * the store.
	 */
	readonly signal?: AbortSignal | undefined;
	/** The prompt's tokens, int64 [1, tokens]. */
	readonly input_ids: EngineTensor;
	/** All ones, as many as `input_ids`: a padded prompt has another KV. Default: just these. */
	readonly attention_mask?: EngineTensor | undefined;
	readonly [option: string]: unknown;
}

/**
 * Keeps the attention state of prompts for one model, so that a prompt that begins like an earlier one is
 * loaded instead of evaluated: in this process or another, now or after a restart.
 *
 * Trouble with the cache is never the caller's: a call that cannot load or store says so in its result, and the
 * prompt is evaluated. Only misuse throws.
 *
 * ```js
 * const cache = await OnnxPrefixCache.open({ session, Tensor, modelPath: "model.onnx", via: client });
 * const { hitTokens, feeds } = await cache.load(tokens);
 * const outputs = await session.run({ ...feeds, ...inputsOf(tokens.slice(hitTokens), hitTokens) });
 * await cache.save(tokens, outputs);
 * ```
 */
export class OnnxPrefixCache<T extends EngineTensor = EngineTensor> implements AsyncDisposable {
	/** Tokens of one chunk: what is loaded and stored is a multiple of it. */
	readonly chunkSize: number;
	/**
	 * Everything that the KV depends on besides tokens and salt. Caches share what is stored where this is the same text;
	 * `npx kvferry doctor --identity TEXT --tokens FILE` tells why a prompt of it misses.
	 */
	readonly identity: string;
	readonly #options: OnnxPrefixCacheOptions<T>;
	readonly #layout: KvLayout;
	readonly #prefix: PrefixCache;
	readonly #tensors: KvTensors;
	readonly #calls: Calls;

	private constructor(
		options: OnnxPrefixCacheOptions<T>,
		layout: KvLayout,
		identity: string,
		prefix: PrefixCache,
		tensors: KvTensors,
	) {
		this.chunkSize = prefix.chunkSize;
		this.identity = identity;
		this.#options = options;
		this.#layout = layout;
		this.#prefix = prefix;
		this.#tensors = tensors;
		this.#calls = new Calls(options);
	}

	/**
	 * Opens the cache for the KV of one model. Who shares it is decided here: the model, the names and shapes of
	 * its KV tensors, precision and engine must agree.
	 *
	 * @throws {@link KvferryError} `UNSUPPORTED_MODEL` for sessions without KV inputs, for other layouts of KV than
	 * `[1, heads, tokens, head size]`, for windows and batches of fixed size, and for inputs beside token ids;
	 * `IDENTITY_UNKNOWN` when an option has to say what the engine does not; `UNREACHABLE` or `TIMEOUT` when a
	 * server does not answer.
	 */
	static async open<T extends EngineTensor>(
		options: OnnxPrefixCacheOptions<T>,
	): Promise<OnnxPrefixCache<T>> {
		checkOptions("OnnxPrefixCache.open", options, OPTIONS);
		const { via, cacheSalt, timeoutMs, signal, Tensor } = options;
		checkVia(via, "openPrefixCache");
		checkSalt(cacheSalt);
		timeoutOf(options);
		throwIfAborted(signal);
		if (typeof Tensor !== "function") {
			throw invalid(
				"Tensor must be the engine's class: onnxruntime's, or transformers.js's with a model",
			);
		}
		const session = sessionOf(options);
		const layout = layoutOf(session, options.layout);
		const { names, kvHeads, headSize, dtype } = layout;
		const identity = `onnx ${await identityOf(session, layout, options)}`;
		const tensors = wrap(
			() => new (native().KvTensors)(names.length, kvHeads, headSize, dtype, via.chunkSize),
		);
		const prefix = await PrefixCache.open({
			via,
			identity,
			bytesPerChunk: wrap(() => tensors.payloadBytes),
			timeoutMs,
			signal,
		});
		return new OnnxPrefixCache(options, layout, identity, prefix, tensors);
	}

	/**
	 * Chunks that came back with other bytes than were stored, since this cache was opened. None of them
	 * reached the engine.
	 */
	get damagedChunks(): number {
		return this.#prefix.damagedChunks;
	}

	/**
	 * Makes tensors of the KV of as many leading tokens as the cache has. At least the prompt's last token remains
	 * to be evaluated: go on with `tokens.slice(hitTokens)`.
	 *
	 * @param tokens The whole prompt, from its first token.
	 * @throws {@link KvferryError} `INVALID_ARGUMENT`, `INVALID_TOKEN`, `INVALID_SALT`, `ABORTED`, `CLOSED`.
	 */
	async load(
		tokens: readonly number[] | readonly bigint[] | Uint32Array | BigInt64Array,
		options: LoadOptions = {},
	): Promise<LoadResult<T>> {
		const started = performance.now();
		const call = this.#calls.begin("load", options, LOAD_OPTIONS);
		const { beyond = 0 } = options;
		checkInteger("beyond", beyond, 0, 2 ** 31 - 1);
		const ids = toTokenIds(tokens);
		return await this.#calls.track(async () => {
			const { data, ...loaded } = await this.#load(ids.subarray(0, -1), beyond, call);
			const feeds = this.#feeds(loaded.hitTokens, data);
			return { ...loaded, feeds, durationMs: performance.now() - started };
		});
	}

	async #load(ids: Uint32Array, beyond: number, call: Call): Promise<Loaded> {
		const asked = performance.now();
		const { signal, timeoutMs } = call;
		const cache = this.#prefix.native;
		try {
			this.#prefix.checkVia();
			const hit = await waitFor(
				() => cache.lookup(ids, call.salt, timeoutMs),
				signal,
				(late) => cache.release(late, timeoutMs),
			);
			if (hit.chunks * this.chunkSize <= beyond) {
				cache.release(hit, timeoutMs).catch(() => {}); // it ends by itself
				return { ...NOTHING, lookupMs: performance.now() - asked };
			}
			const reading = await waitFor(
				() => cache.load(hit, timeoutMs),
				signal,
				(late) => cache.finish(late, timeoutMs),
			);
			const lookupMs = performance.now() - asked;
			try {
				return { ...(await this.#read(reading, beyond, signal)), lookupMs };
			} finally {
				// Every byte was checked as it was copied: nobody has to wait for this.
				cache.finish(reading, timeoutMs).catch(() => {});
			}
		} catch (error) {
			return { ...NOTHING, failure: troubleOf(error) };
		}
	}

	async #read(
		reading: PrefixReading,
		beyond: number,
		signal: AbortSignal | undefined,
	): Promise<Omit<Loaded, "lookupMs">> {
		let { chunks } = reading;
		while (chunks * this.chunkSize > beyond) {
			const hitTokens = chunks * this.chunkSize;
			const data = this.#layout.names.map(() => newData(this.#layout, hitTokens));
			const bytes = data.map(bytesOf);
			const load = wrap(() => this.#tensors.load(reading, chunks));
			await inTurns(() => load.copy(bytes), signal);
			if (load.loaded === chunks) {
				return { hitTokens, data, bytes: chunks * this.#prefix.bytesPerChunk };
			}
			// Fewer tokens lie elsewhere in tensors: they are made anew, without the chunk that is damaged.
			chunks = load.loaded;
		}
		return NOTHING;
	}

	#feeds(tokens: number, data: Loaded["data"]): Record<string, T> {
		const { Tensor } = this.#options;
		const { names, kvHeads, headSize, dtype } = this.#layout;
		const dims = [1, kvHeads, tokens, headSize];
		const feeds = names.map((name, at): [string, T] => {
			const elements = data[at] ?? newData(this.#layout, 0);
			return [`past_key_values.${name}`, new Tensor(dtype, elements, [...dims])];
		});
		return Object.fromEntries(feeds);
	}

	/**
	 * Stores the KV that a run has left, in whole chunks, unless the cache has it already.
	 *
	 * @param tokens All tokens of the prompt whose KV it is, those that were loaded included. One more is
	 * allowed: the last generated token has not been evaluated.
	 * @param outputs The run's `present.*`, or a `DynamicCache` with `past_key_values.*`. Do not transfer their
	 * buffers until the call returns.
	 * @throws {@link KvferryError} `INVALID_ARGUMENT`, `INVALID_TOKEN`, `INVALID_SALT`, `ABORTED`, `CLOSED`.
	 */
	async save(
		tokens: readonly number[] | readonly bigint[] | Uint32Array | BigInt64Array,
		outputs: object,
		options: RequestOptions = {},
	): Promise<SaveResult> {
		const started = performance.now();
		const call = this.#calls.begin("save", options);
		const ids = toTokenIds(tokens);
		checkObject("outputs", outputs);
		const held = heldBy(outputs, this.#layout);
		if (ids.length !== held.tokens && ids.length !== held.tokens + 1) {
			throw invalid(
				`the tensors hold ${held.tokens} tokens and ${ids.length} were given: give all of them, from the ` +
					"prompt's first (a sliding window that has moved on cannot be stored)",
			);
		}
		return await this.#calls.track(async () => {
			const stored = await this.#save(ids, held, call);
			return { ...stored, durationMs: performance.now() - started };
		});
	}

	async #save(ids: Uint32Array, held: Held, call: Call): Promise<Stored> {
		const count = held.tokens - (held.tokens % this.chunkSize);
		if (count === 0) {
			throwIfAborted(call.signal);
			return UNSAVED;
		}
		const { signal, timeoutMs } = call;
		const cache = this.#prefix.native;
		try {
			this.#prefix.checkVia();
			const writing = await waitFor(
				() => cache.store(ids.subarray(0, count), call.salt, timeoutMs),
				signal,
				(late) => cache.abandon(late, timeoutMs),
			);
			const { length } = writing.chunks;
			try {
				await this.#write(writing, held, signal);
			} catch (error) {
				await cache.abandon(writing, timeoutMs).catch(() => {}); // the first error tells more
				throw error;
			}
			const committed = await waitFor(() => cache.commit(writing, timeoutMs), signal);
			const refused = (writing.refused ?? 0) + (committed ? 0 : length);
			return {
				storedTokens: Math.max(0, count - refused * this.chunkSize),
				bytes: committed ? length * this.#prefix.bytesPerChunk : 0,
				refusedTokens: refused * this.chunkSize,
			};
		} catch (error) {
			return { ...UNSAVED, failure: troubleOf(error) };
		}
	}

	async #write(
		writing: PrefixWriting,
		{ tokens, bytes }: Held,
		signal: AbortSignal | undefined,
	): Promise<void> {
		const store = wrap(() => this.#tensors.store(writing, tokens));
		await inTurns(() => store.copy(bytes), signal);
	}

	/**
	 * Has transformers.js's model go on with a prompt, with the cache before and after: the result is what
	 * `model.generate` alone would have given, if the model computes the same for a prompt in two parts.
	 *
	 * @param options What `model.generate` takes: `input_ids` and so on, and {@link RequestOptions} of the cache.
	 * @throws What `model.generate` throws, and {@link KvferryError} as {@link OnnxPrefixCache.load} does.
	 */
	async generate(options: GenerateOptions): Promise<GenerateResult<T>> {
		const { model, DynamicCache } = this.#options;
		if (typeof model?.generate !== "function" || typeof DynamicCache !== "function") {
			throw invalid(
				"generate needs the options `model` and `DynamicCache` of OnnxPrefixCache.open",
			);
		}
		checkObject("the options of generate", options);
		const { cacheSalt, timeoutMs, signal, ...inputs } = options;
		checkSpelling("generate", inputs);
		const request = { cacheSalt, timeoutMs, signal };
		const prompt = promptOf(inputs);
		const { feeds, ...loaded } = await this.load(prompt, request);
		const { sequences, past_key_values } = await model.generate({
			...inputs,
			// Without one, transformers.js takes all tokens for such that come behind what is loaded.
			attention_mask: inputs.attention_mask ?? this.#ones(prompt.length),
			...(signal === undefined ? {} : { stopping_criteria: stoppedBy(signal, inputs) }),
			past_key_values: new DynamicCache(loaded.hitTokens > 0 ? feeds : undefined),
			return_dict_in_generate: true,
		});
		throwIfAborted(signal);
		const saved = await this.save(sequences.data, past_key_values, request).catch(
			(error: unknown): SaveResult => ({ ...UNSAVED, durationMs: 0, failure: fromNative(error) }),
		);
		return { sequences, loaded, saved }; // whatever became of the cache, this was computed
	}

	#ones(tokens: number): T {
		return new this.#options.Tensor("int64", new BigInt64Array(tokens).fill(1n), [1, tokens]);
	}

	/**
	 * Waits for calls under way and ends the registration; what is stored stays, and so does the `Client` or
	 * `Server`. Calling it again does nothing.
	 */
	close(): Promise<void> {
		return this.#calls.close(() => this.#prefix.close());
	}

	/** The same as {@link OnnxPrefixCache.close}. */
	async [Symbol.asyncDispose](): Promise<void> {
		await this.close();
	}
}

type Loaded = Pick<LoadResult, "hitTokens" | "bytes" | "lookupMs" | "failure"> & {
	/** Of each tensor; none when nothing was loaded. */
	readonly data: readonly (Float32Array | Uint16Array)[];
};
type Stored = Pick<SaveResult, "storedTokens" | "bytes" | "refusedTokens" | "failure">;

const NOTHING: Loaded = { hitTokens: 0, bytes: 0, lookupMs: 0, data: [] };
const UNSAVED: Stored = { storedTokens: 0, bytes: 0, refusedTokens: 0 };

/** Copies until there is no more, and lets the event loop turn in between. */
async function inTurns(copy: () => boolean, signal: AbortSignal | undefined): Promise<void> {
	throwIfAborted(signal);
	while (wrap(copy)) {
		await setImmediate();
		throwIfAborted(signal);
	}
}

function sessionOf({ session, model }: OnnxPrefixCacheOptions): EngineSession {
	// As transformers.js chooses it.
	const found = session ?? model?.sessions?.decoder_model_merged ?? model?.sessions?.model;
	if (!Array.isArray(found?.inputNames) || !Array.isArray(found.outputNames)) {
		throw invalid("pass onnxruntime's `session`, or transformers.js's `model`");
	}
	return found;
}

/** The caller's criteria, if there are any, and one that stops when the signal has aborted. */
function stoppedBy(signal: AbortSignal, { stopping_criteria }: GenerateOptions): unknown[] {
	const given = stopping_criteria ?? []; // null is transformers.js's default
	const criteria = Symbol.iterator in Object(given) ? (given as Iterable<unknown>) : [given];
	return [...criteria, (sequences: unknown[]) => sequences.map(() => signal.aborted)];
}

/** The tokens of a prompt for transformers.js. */
function promptOf(inputs: GenerateOptions): BigInt64Array {
	const { input_ids, attention_mask, past_key_values } = inputs;
	if (past_key_values !== undefined) {
		throw invalid("past_key_values come from the cache: leave them out, or use load and save");
	}
	checkObject("input_ids", input_ids);
	const { type, dims, data } = input_ids;
	if (type !== "int64" || dims?.length !== 2 || dims[0] !== 1 || !types.isBigInt64Array(data)) {
		throw invalid(`input_ids is ${type} [${dims}]: it must be an int64 tensor [1, tokens]`);
	}
	if (attention_mask !== undefined && attention_mask !== null) {
		checkObject("attention_mask", attention_mask);
		const mask = attention_mask.data as BigInt64Array;
		if (mask?.length !== data.length) {
			throw invalid(
				`attention_mask is for ${mask?.length ?? "no"} tokens and input_ids has ${data.length}: give the tokenizer's, or none`,
			);
		}
		if (mask.some((seen) => Number(seen) !== 1)) {
			throw invalid("attention_mask hides tokens: give the prompt without padding");
		}
	}
	return data;
}
