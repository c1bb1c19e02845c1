/**
 * A KV cache for node-llama-cpp that outlives requests and processes.
 *
 * @packageDocumentation
 */
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { checkHandle, checkOptions, checkSalt, checkVia, invalid, shown } from "../arguments.js";
import { PrefixCache, type RequestOptions } from "../cache.js";
import type { Client } from "../client.js";
import { type ErrorCode, ErrorCodes, fromNative, KvferryError, wrap } from "../errors.js";
import { native } from "../native.js";
import type { LlamaState, LlamaStateFile } from "../native-binding.js";
import type { Server } from "../server.js";
import { throwIfAborted, timeoutOf, type WaitOptions, waitFor } from "../waiting.js";
import { type Call, Calls, checkSpelling, toTokenIds, troubleOf } from "./calls.js";
import { checkModel, type IdentityOptions, identityOf } from "./llama-identity.js";
import { Provenance } from "./llama-provenance.js";
import type {
	EngineChatSession,
	EngineContext,
	EngineLlama,
	EngineModel,
	EngineSequence,
	EngineTokenizer,
} from "./node-llama-cpp.js";

export {
	type EngineChatSession,
	type EngineContext,
	type EngineLlama,
	type EngineModel,
	type EngineSequence,
	type EngineTokenizer,
	type ErrorCode,
	ErrorCodes,
	type IdentityOptions,
	KvferryError,
	type RequestOptions,
	type WaitOptions,
};

/** How a {@link LlamaPrefixCache} is set up. */
export interface LlamaPrefixCacheOptions extends IdentityOptions, RequestOptions {
	/** The `LlamaContext` whose sequences are going to be restored and saved. */
	readonly context: EngineContext;
	/** Where the cache is: a server in another process, or one in this process. */
	readonly via: Client | Server;
	/**
	 * An empty sequence of the context, from which the shape of its state is learned; it is empty again
	 * afterwards. Needed only when all sequences of the context are taken.
	 */
	readonly sequence?: EngineSequence | undefined;
}

const OPTIONS = {
	context: true,
	via: true,
	sequence: true,
	modelSha256: true,
	modelPath: true,
	lora: true,
	cacheSalt: true,
	signal: true,
	timeoutMs: true,
} satisfies Record<keyof LlamaPrefixCacheOptions, true>;

/** What {@link LlamaPrefixCache.restore} did. */
export interface RestoreResult {
	/**
	 * Leading tokens that were loaded from the cache, in whole chunks of {@link LlamaPrefixCache.chunkSize}: always 0 for a
	 * prompt that is no longer than one, and 0 when the cache had no more than the sequence itself.
	 */
	readonly hitTokens: number;
	/** Leading tokens that the sequence holds now; the others are to be evaluated. */
	readonly readyTokens: number;
	/** Bytes that came from the cache. */
	readonly bytes: number;
	/** Time that the call took, in milliseconds. */
	readonly durationMs: number;
	/** How much of it went by until the cache had answered; 0 when it was not asked or did not. */
	readonly lookupMs: number;
	/** Why nothing was loaded, when that was trouble and no plain miss. */
	readonly failure?: KvferryError;
}

/** What {@link LlamaPrefixCache.save} did. */
export interface SaveResult {
	/**
	 * Leading tokens that the cache holds, by its latest answer, in whole chunks of {@link LlamaPrefixCache.chunkSize}: always
	 * 0 for what is shorter than one, and 0 with a failure.
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

/** What {@link LlamaPrefixCache.prompt} returns. */
export interface PromptResult {
	/** What the session answered. */
	readonly response: string;
	/** What was loaded before. */
	readonly restored: RestoreResult;
	/** What was stored after. */
	readonly saved: SaveResult;
}

/**
 * Keeps the attention state of prompts for the contexts of one model, so that a prompt that begins like
 * an earlier one is loaded instead of evaluated: in this process or another, now or after a
 * restart.
 *
 * Trouble with the cache is never the caller's: a call that cannot load or store says so in
 * its result, and the prompt is evaluated. Only misuse throws.
 *
 * ```js
 * const cache = await LlamaPrefixCache.open({ context, via: client });
 * const session = new LlamaChatSession({ contextSequence: context.getSequence() });
 * const { response } = await cache.prompt(session, question);
 * ```
 */
export class LlamaPrefixCache implements AsyncDisposable {
	/** Tokens of one chunk: what is loaded and stored is a multiple of it. */
	readonly chunkSize: number;
	/**
	 * Everything that the state depends on besides tokens and salt. Caches share what is stored where this is the same text;
	 * `npx kvferry doctor --identity TEXT --tokens FILE` tells why a prompt of it misses.
	 */
	readonly identity: string;
	readonly #context: EngineContext;
	readonly #prefix: PrefixCache;
	readonly #state: LlamaState;
	readonly #calls: Calls;
	readonly #provenance = new Provenance();

	private constructor(
		options: LlamaPrefixCacheOptions,
		identity: string,
		prefix: PrefixCache,
		state: LlamaState,
	) {
		this.chunkSize = prefix.chunkSize;
		this.identity = identity;
		this.#context = options.context;
		this.#prefix = prefix;
		this.#state = state;
		this.#calls = new Calls(options);
	}

	/**
	 * Opens the cache for the state of one context. Who shares it is decided here: the model, its KV types,
	 * flash attention, LoRA adapters, RoPE settings and the release of llama.cpp must agree. Evaluates
	 * one token, to learn the shape of the state from the engine itself.
	 *
	 * @throws {@link KvferryError} `UNSUPPORTED_MODEL` for sliding-window, hybrid, recurrent and M-RoPE
	 * models, `IDENTITY_UNKNOWN` when an option has to say what the engine does not, `UNREACHABLE` or
	 * `TIMEOUT` when a server does not answer.
	 */
	static async open(options: LlamaPrefixCacheOptions): Promise<LlamaPrefixCache> {
		checkOptions("LlamaPrefixCache.open", options, OPTIONS);
		const { context, via, cacheSalt, timeoutMs, signal } = options;
		checkVia(via, "openPrefixCache");
		checkHandle("context", context, "getSequence", "give await model.createContext()");
		checkSalt(cacheSalt);
		timeoutOf(options);
		throwIfAborted(signal);
		checkModel(context.model);
		const engine = await identityOf(context, options);
		const sample = await sampleState(context, options.sequence);
		const { descriptor, streams } = wrap(() => native().llamaShape(sample));
		const identity = `llama.cpp ${engine} ${Buffer.from(descriptor).toString("base64")}`;
		const prefix = await PrefixCache.open({
			via,
			identity,
			bytesPerChunk: wrap(() => native().llamaPayloadBytes(descriptor, via.chunkSize)),
			timeoutMs,
			signal,
		});
		const state = wrap(() => new (native().LlamaState)(prefix.native, descriptor, streams));
		return new LlamaPrefixCache(options, identity, prefix, state);
	}

	/**
	 * Chunks that came back with other bytes than were stored, since this cache was opened. None of them
	 * reached the engine.
	 */
	get damagedChunks(): number {
		return this.#prefix.damagedChunks;
	}

	/**
	 * Makes the sequence hold as many leading tokens of a prompt as it and the cache have, and no others.
	 * At least the prompt's last token remains to be evaluated: go on with
	 * `tokens.slice(sequence.nextTokenIndex)`.
	 *
	 * @param sequence Of the cache's context, and not being evaluated.
	 * @param tokens The whole prompt, from the sequence's first token.
	 * @throws {@link KvferryError} `INVALID_ARGUMENT`, `INVALID_TOKEN`, `INVALID_SALT`, `ABORTED`, `CLOSED`.
	 */
	async restore(
		sequence: EngineSequence,
		tokens: readonly number[] | Uint32Array,
		options: RequestOptions = {},
	): Promise<RestoreResult> {
		const started = performance.now();
		const call = this.#begin("restore", sequence, options);
		const ids = toTokenIds(tokens);
		return await this.#calls.track(async () => {
			const loaded = await this.#restore(sequence, ids, call);
			const readyTokens = sequence.nextTokenIndex;
			return { ...loaded, readyTokens, durationMs: performance.now() - started };
		});
	}

	async #restore(sequence: EngineSequence, ids: Uint32Array, call: Call): Promise<Loaded> {
		if (sequence.nextTokenIndex > 0) {
			await sequence.adaptStateToTokens(Array.from(ids.subarray(0, -1)), false);
		}
		const { sound } = this.#provenance.look(sequence, call.salt);
		const unsound = sequence.nextTokenIndex - sound;
		if (unsound > 0 && unsound < this.chunkSize) {
			// Nothing behind such tokens is stored: a few are dropped, or a sequence would never be stored again.
			await sequence.adaptStateToTokens(Array.from(ids.subarray(0, sound)), false);
			this.#provenance.look(sequence, call.salt);
		}
		const local = sequence.nextTokenIndex;
		const usable = Math.min(ids.length - 1, sequence.contextSize);
		if (this.#wholeChunks(usable) <= local) {
			return NOTHING;
		}
		let file: LlamaStateFile | undefined;
		try {
			this.#prefix.checkVia();
			file = await waitFor(
				() => this.#state.restore(ids.subarray(0, usable), local, call.salt, call.timeoutMs),
				call.signal,
				(late) => late.release(),
			);
			if (file.tokens === 0) {
				this.#provenance.markCached(sequence, call.salt, Math.min(file.found, local));
				return { ...NOTHING, lookupMs: file.lookupMs };
			}
			await load(sequence, file);
			this.#provenance.markLoaded(sequence, call.salt);
			return { hitTokens: file.tokens, bytes: file.bytes, lookupMs: file.lookupMs };
		} catch (error) {
			this.#provenance.look(sequence, call.salt);
			return { ...NOTHING, failure: troubleOf(error) };
		} finally {
			file?.release();
		}
	}

	/**
	 * Stores what the sequence holds, in whole chunks, unless the cache has it already. Nothing is stored where a
	 * context shift may have moved tokens since the cache last saw the sequence: their state is not that of a prefix. So save before
	 * tokens are erased, be it from the end.
	 *
	 * @param sequence Of the cache's context, and not being evaluated.
	 * @throws {@link KvferryError} `INVALID_ARGUMENT`, `INVALID_SALT`, `ABORTED`, `CLOSED`.
	 */
	async save(sequence: EngineSequence, options: RequestOptions = {}): Promise<SaveResult> {
		return await this.#saved(sequence, options, false);
	}

	/** @param chat Whether nothing but a chat session has used the sequence since the last look. */
	async #saved(
		sequence: EngineSequence,
		options: RequestOptions,
		chat: boolean,
	): Promise<SaveResult> {
		const started = performance.now();
		const call = this.#begin("save", sequence, options);
		return await this.#calls.track(async () => {
			const stored = await this.#save(sequence, call, chat);
			return { ...stored, durationMs: performance.now() - started };
		});
	}

	async #save(sequence: EngineSequence, call: Call, chat: boolean): Promise<Stored> {
		const { sound, cached } = this.#provenance.look(sequence, call.salt, chat);
		const count = this.#wholeChunks(sound);
		if (count === 0) {
			return UNSAVED;
		}
		let file: LlamaStateFile | undefined;
		try {
			this.#prefix.checkVia(); // a cache that is gone holds nothing, whatever it took before
			if (count <= cached) {
				return { ...UNSAVED, storedTokens: this.#wholeChunks(cached) };
			}
			const ids = Uint32Array.from(sequence.contextTokens.slice(0, count));
			const written = wrap(() => this.#state.createFile());
			file = written;
			await sequence.saveStateToFile(written.path);
			const { bytes, refused } = await waitFor(
				() => this.#state.store(written, ids, call.salt, call.timeoutMs),
				call.signal,
				() => {},
			);
			const refusedTokens = (refused ?? 0) * this.chunkSize;
			const storedTokens = Math.max(0, count - refusedTokens);
			this.#provenance.markCached(sequence, call.salt, storedTokens);
			return { storedTokens, bytes, refusedTokens };
		} catch (error) {
			const failure = troubleOf(error);
			this.#provenance.markCached(sequence, call.salt, 0); // the next save asks again
			return { ...UNSAVED, failure };
		} finally {
			file?.release();
		}
	}

	/**
	 * Prompts a chat session, with the cache before and after: the answer is what `session.prompt` alone
	 * would have answered. It comes after it was stored; `onTextChunk` and `onToken` do not wait. Prompts of one sequence
	 * wait for each other, as those of a session do.
	 *
	 * @param session On a sequence of the cache's context.
	 * @param text The user's message.
	 * @param options Those of `session.prompt`, and `cacheSalt` and `timeoutMs` of the cache. The signal ends the cache's waits,
	 * too: an answer that is there already comes with the failure `ABORTED` beside it.
	 * @throws What `session.prompt` throws, and {@link KvferryError} as {@link LlamaPrefixCache.restore}
	 * does.
	 */
	async prompt<Session extends EngineChatSession>(
		session: Session,
		text: string,
		options?: Parameters<Session["prompt"]>[1] & Omit<RequestOptions, "signal">,
	): Promise<PromptResult> {
		const remedy = "give a LlamaChatSession on a sequence of the cache's context";
		checkHandle("session", session, "sequence", remedy);
		if (typeof text !== "string") {
			throw invalid(`text is ${shown(text)}: give the user's message, a string`);
		}
		const { cacheSalt, timeoutMs, ...promptOptions }: PromptOptions = options ?? {};
		checkSpelling("prompt", promptOptions);
		const request = { cacheSalt, timeoutMs };
		const { sequence } = session;
		const { salt } = this.#begin("prompt", sequence, request);
		return await inTurn(sequence, promptOptions.signal, async () => {
			const tokens = promptTokens(session, text, promptOptions);
			const { signal } = promptOptions;
			// A prompt that does not fit is made to by the session, nobody knows how: what the sequence holds is left to it.
			const restored =
				tokens.length < sequence.contextSize
					? await this.restore(sequence, tokens, { ...request, signal }).catch((error: unknown) =>
							unrestored(sequence, error),
						)
					: { ...NOTHING, readyTokens: sequence.nextTokenIndex, durationMs: 0 };
			this.#provenance.look(sequence, salt); // from here on, only the session uses it
			const response = await session.prompt(text, promptOptions);
			// The engine's answer stays, also where the cache was closed meanwhile. One that the signal has cut off is stored as well.
			const waiting = signal?.aborted ? request : { ...request, signal };
			const saved = await this.#saved(sequence, waiting, true).catch(
				(error: unknown): SaveResult => ({ ...UNSAVED, durationMs: 0, failure: fromNative(error) }),
			);
			return { response, restored, saved };
		});
	}

	/**
	 * Waits for calls under way and ends the registration; what is stored stays, and so does the `Client` or
	 * `Server`. Calling it again does nothing.
	 */
	close(): Promise<void> {
		return this.#calls.close(async () => {
			this.#state.close();
			await this.#prefix.close();
		});
	}

	/** The same as {@link LlamaPrefixCache.close}. */
	async [Symbol.asyncDispose](): Promise<void> {
		await this.close();
	}

	#begin(of: string, sequence: EngineSequence, options: RequestOptions): Call {
		const call = this.#calls.begin(of, options);
		checkHandle("sequence", sequence, "contextTokens", "give context.getSequence()");
		if (sequence.disposed) {
			throw invalid("the sequence was disposed: get another one");
		}
		if (sequence.context !== this.#context) {
			throw invalid("the sequence is of another context: open a cache for each context");
		}
		return call;
	}

	#wholeChunks(tokens: number): number {
		return tokens - (tokens % this.chunkSize);
	}
}

type Loaded = Pick<RestoreResult, "hitTokens" | "bytes" | "lookupMs" | "failure">;
type Stored = Pick<SaveResult, "storedTokens" | "bytes" | "refusedTokens" | "failure">;
type PromptOptions = RequestOptions & Parameters<typeof promptTokens>[2];

const NOTHING: Loaded = { hitTokens: 0, bytes: 0, lookupMs: 0 };
const UNSAVED: Stored = { storedTokens: 0, bytes: 0, refusedTokens: 0 };

/** The sequence is empty after a load that failed. */
async function load(sequence: EngineSequence, file: LlamaStateFile): Promise<void> {
	if (sequence.nextTokenIndex > 0) {
		await sequence.clearHistory(); // a load that fails on a populated sequence breaks it for good
	}
	try {
		await sequence.loadStateFromFile(file.path, { acceptRisk: true });
	} catch (error) {
		await sequence.clearHistory();
		throw error;
	}
}

/** The last of the prompts that use a sequence. */
const turns = new WeakMap<EngineSequence, Promise<void>>();

/** Runs `work` once nothing that was asked for before uses the sequence; `work` is left out if the signal aborts sooner. */
async function inTurn<T>(
	sequence: EngineSequence,
	signal: AbortSignal | undefined,
	work: () => Promise<T>,
): Promise<T> {
	const before = turns.get(sequence) ?? Promise.resolve();
	const own = (async () => {
		await waitFor(() => before, signal).catch((error: unknown) => {
			throw signal?.aborted ? signal.reason : error; // as the session does
		});
		return await work();
	})();
	turns.set(
		sequence,
		Promise.allSettled([before, own]).then(() => {}),
	);
	return await own;
}

/**
 * A prompt's restore that failed. A cache that was closed while the prompt waited is no reason not to answer; what becomes of one
 * whose signal has aborted is the session's to say.
 */
function unrestored(sequence: EngineSequence, error: unknown): RestoreResult {
	const failure = fromNative(error);
	if (failure.code !== "CLOSED" && failure.code !== "ABORTED") {
		throw failure;
	}
	return { ...NOTHING, readyTokens: sequence.nextTokenIndex, durationMs: 0, failure };
}

/**
 * The tokens that `session.prompt` is going to evaluate. A wrong guess costs what the sequence holds behind it, nothing else.
 */
function promptTokens(
	session: EngineChatSession,
	text: string,
	options: {
		functions?: unknown;
		documentFunctionParams?: unknown;
		responsePrefix?: string;
	},
): number[] {
	const { responsePrefix = "" } = options;
	const chatHistory = [
		// After a context shift the session goes on from what it has kept of the history.
		...(session.getLastEvaluationContextWindow() ?? session.getChatHistory()),
		{ type: "user", text },
		{ type: "model", response: responsePrefix === "" ? [] : [responsePrefix] },
	];
	const { contextText } = session.chatWrapper.generateContextState({
		chatHistory,
		availableFunctions: options.functions,
		documentFunctionParams: options.documentFunctionParams,
	});
	return contextText.tokenize(session.sequence.context.model.tokenizer);
}

/** The state file of one token: it shows the shape of all. */
async function sampleState(
	context: EngineContext,
	given: EngineSequence | undefined,
): Promise<Uint8Array> {
	if (given === undefined && context.sequencesLeft === 0) {
		throw invalid(
			"all sequences of the context are taken: open the cache before getSequence(), " +
				"or pass an empty one as `sequence`",
		);
	}
	if (given !== undefined && given.context !== context) {
		throw invalid("the sequence is of another context: pass an empty one of the cache's context");
	}
	if (given !== undefined && given.nextTokenIndex !== 0) {
		throw invalid(`the sequence holds ${given.nextTokenIndex} tokens: pass an empty one`);
	}
	const directory = await temporaryDirectory();
	try {
		const path = join(directory, "state");
		const sequence = given ?? context.getSequence();
		try {
			await sequence.evaluateWithoutGeneratingNewTokens([context.model.tokens.bos ?? 0]);
			await sequence.saveStateToFile(path);
		} finally {
			await (given === undefined ? sequence.dispose() : sequence.clearHistory());
		}
		return await readFile(path);
	} finally {
		await rm(directory, { recursive: true, force: true });
	}
}

async function temporaryDirectory(): Promise<string> {
	try {
		return await mkdtemp(join(tmpdir(), "kvferry-"));
	} catch (error) {
		throw new KvferryError(
			"SYSTEM",
			`${(error as Error).message}: set TMPDIR to a directory that can be written to`,
			{ cause: error },
		);
	}
}
