import {
	checkBoolean,
	checkInteger,
	checkOptions,
	checkText,
	invalid,
	shown,
	warningsTo,
} from "./arguments.js";
import { fromNative, KvferryError, wrap } from "./errors.js";
import { askEvents, type EventsOptions, type KvEvents } from "./events.js";
import { native } from "./native.js";
import type {
	Explanation,
	Client as NativeClient,
	PrefixCache as NativePrefixCache,
	PagedLayout,
	PagedPlace,
	PagedScheduler,
	PagedWorker,
} from "./native-binding.js";
import type { Status } from "./server.js";
import { type TokenOptions, tokenOf } from "./token.js";
import { timeoutOf, timeoutOfCall, type WaitOptions, waitFor } from "./waiting.js";

/** Where a {@link Client} connects to. */
export interface ClientOptions extends WaitOptions, TokenOptions {
	/**
	 * `tcp://host:port`, `host:port`, or `ipc:///path` of a Unix socket. Another machine's takes a token. Default
	 * "tcp://127.0.0.1:5555".
	 */
	readonly url?: string;
	/**
	 * What happens when no server answers. `"throw"` (default): {@link Client.connect} fails. `"warn"`:
	 * within `timeoutMs`, and 3,000 ms at most, it gives a client without a connection, with a warning of
	 * the address and of the command that starts a server; whatever uses the client works as without a
	 * cache, and joins the server when one is there.
	 */
	readonly whenUnreachable?: "throw" | "warn";
	/**
	 * Tokens of a chunk to count with until a server is there, 1 to 2^32 - 1; for `whenUnreachable:
	 * "warn"`. A server whose chunks have another size is not joined then: calls fail with `PROTOCOL`.
	 * Default 256, a server's own default.
	 */
	readonly chunkSize?: number;
	/**
	 * Whether the server's memory is mapped where that is possible. Where it is not (another machine, user or container), and
	 * with false, the bytes go through the connection, which takes longer; see {@link Client.inFrames}. Default true.
	 */
	readonly sharedMemory?: boolean;
	/** Gets the warning. Default: `process.emitWarning(message, "KvferryWarning")`. */
	readonly onWarning?: (message: string) => void;
}

const OPTIONS = {
	url: true,
	whenUnreachable: true,
	chunkSize: true,
	sharedMemory: true,
	onWarning: true,
	token: true,
	tokenFile: true,
	signal: true,
	timeoutMs: true,
} satisfies Record<keyof ClientOptions, true>;

/** How long a start may be held up by a server that does not answer. */
const WARN_AFTER_MS = 3_000;

/**
 * Whose prompt is asked about.
 *
 * @internal
 */
export interface PromptQuestion {
	readonly modelName: string;
	readonly kvWorldSize: number;
	readonly tokens: Uint32Array;
	/** "" for none. */
	readonly cacheSalt: string;
}

/**
 * A connection to a cache server: kvferry's, or LMCache's (0.4.7, 0.5.0 to 0.5.6) in engine-driven mode
 * with shared memory. Which one it is, the client finds out.
 *
 * It heals itself: when the server goes away, calls fail at once with `UNREACHABLE` and caches miss;
 * when it is back, the client registers and maps its memory again. It never keeps the process running.
 *
 * @example
 * ```ts
 * const client = await Client.connect({ url: "tcp://127.0.0.1:5555" });
 * console.log(await client.ping()); // milliseconds
 * ```
 */
export class Client implements AsyncDisposable {
	/** The address, as it was given. */
	readonly url: string;
	/** Tokens of one chunk at the server; before there was one, {@link ClientOptions.chunkSize}. */
	readonly chunkSize: number;
	readonly #native: NativeClient;
	#closing: Promise<void> | undefined;

	private constructor(client: NativeClient, url: string) {
		this.#native = client;
		this.url = url;
		this.chunkSize = client.chunkSize;
	}

	/**
	 * Connects to a server.
	 *
	 * @throws {@link KvferryError} `UNREACHABLE` when none listens, `TIMEOUT` when one does not answer or
	 * is of an unknown release (neither with `whenUnreachable: "warn"`), `PROTOCOL` when something else
	 * listens, `UNAUTHORIZED` when it wants a token or another one, `UNSUPPORTED_OPTION` for another machine's
	 * address without a token, or a token for a server that takes none.
	 */
	static async connect(options: ClientOptions = {}): Promise<Client> {
		checkOptions("Client.connect", options, OPTIONS);
		const { url = "tcp://127.0.0.1:5555", whenUnreachable = "throw", chunkSize = 256 } = options;
		const { sharedMemory = true } = options;
		const onWarning = warningsTo(options.onWarning);
		checkText("url", url);
		checkInteger("chunkSize", chunkSize, 1, 2 ** 32 - 1);
		if (whenUnreachable !== "throw" && whenUnreachable !== "warn") {
			throw invalid(`whenUnreachable is ${shown(whenUnreachable)}: it must be "throw" or "warn"`);
		}
		checkBoolean("sharedMemory", sharedMemory);
		const token = tokenOf(options);
		const timeoutMs = timeoutOf(options);
		const warn = whenUnreachable === "warn";
		const client = await waitFor(
			() =>
				warn
					? native().Client.connect(
							url,
							Math.min(timeoutMs, WARN_AFTER_MS),
							chunkSize,
							token,
							sharedMemory,
						)
					: native().Client.connect(url, timeoutMs, undefined, token, sharedMemory),
			options.signal,
			(late) => late.close(timeoutMs),
		);
		const connected = new Client(client, url);
		const { failure } = client;
		if (warn && typeof failure === "string") {
			const { message } = fromNative(new Error(failure));
			onWarning(`${message}. Going on without a cache until one is there.`);
		}
		return connected;
	}

	/** Whether there is a connection now. Why there is none, the error of any call says. */
	get connected(): boolean {
		return typeof this.#native.failure !== "string";
	}

	/**
	 * Why nothing can be asked of the server now.
	 *
	 * @internal
	 */
	get trouble(): KvferryError | undefined {
		if (this.#closing !== undefined) {
			return new KvferryError(
				"CLOSED",
				`The client of ${this.url} was closed; connect another one.`,
			);
		}
		const { failure } = this.#native;
		return typeof failure === "string" ? fromNative(new Error(failure)) : undefined;
	}

	/**
	 * Between which releases of LMCache the server is, by what it answers.
	 *
	 * @internal
	 */
	get releases(): string | undefined {
		return this.#native.releases ?? undefined;
	}

	/**
	 * Why bytes go through the connection (in frames) and not through shared memory; undefined where they do not. It is
	 * found out when a cache or a connector registers, and undefined before.
	 */
	get inFrames(): string | undefined {
		return this.#native.inFrames ?? undefined;
	}

	/**
	 * Finds out what {@link Client.inFrames} says.
	 *
	 * @internal
	 */
	async findWay(options: WaitOptions = {}): Promise<string | undefined> {
		this.#checkOpen();
		const timeoutMs = timeoutOf(options);
		return (await waitFor(() => this.#native.findWay(timeoutMs), options.signal)) ?? undefined;
	}

	/** Asks the server for a sign of life; resolves to the milliseconds that it took. */
	async ping(options: WaitOptions = {}): Promise<number> {
		this.#checkOpen();
		const timeoutMs = timeoutOfCall("ping", options);
		return await waitFor(() => this.#native.ping(timeoutMs), options.signal);
	}

	/**
	 * The server's figures, by name.
	 *
	 * @throws {@link KvferryError} `UNSUPPORTED_OPTION` when the server is not kvferry's, `UNAUTHORIZED` when it has
	 * tokens and this is not the admin's.
	 */
	async status(options: WaitOptions = {}): Promise<Status> {
		this.#checkOpen();
		const timeoutMs = timeoutOfCall("status", options);
		const figures = await waitFor(() => this.#native.status(timeoutMs), options.signal);
		return Object.fromEntries(figures);
	}

	/**
	 * Empties the cache, for everybody: what is neither leased nor being written goes.
	 *
	 * @throws {@link KvferryError} `UNAUTHORIZED` as {@link Client.status}.
	 */
	async clear(options: WaitOptions = {}): Promise<void> {
		this.#checkOpen();
		const timeoutMs = timeoutOfCall("clear", options);
		await waitFor(() => this.#native.clear(timeoutMs), options.signal);
	}

	/**
	 * What became visible in the cache and what went, for an index of one's own: ask again from
	 * `nextCursor`. Another `incarnation`, or `lost`, means that the index is void: begin a new one,
	 * without a cursor. Chunks whose events are no longer kept are not told of.
	 *
	 * **WARNING** Events name the tenants' salts.
	 *
	 * @throws {@link KvferryError} `UNSUPPORTED_OPTION`, `UNAUTHORIZED` as {@link Client.status}.
	 */
	async events(options: EventsOptions = {}): Promise<KvEvents> {
		this.#checkOpen();
		return await askEvents((...asked) => this.#native.events(...asked), options);
	}

	/** Ends the connection. Calling it again does nothing. */
	async close(options: WaitOptions = {}): Promise<void> {
		const timeoutMs = timeoutOfCall("close", options);
		this.#closing ??= this.#native.close(timeoutMs).catch(() => {}); // the server notices by itself
		const closing = this.#closing;
		await waitFor(() => closing, options.signal);
	}

	/** The same as {@link Client.close}. */
	async [Symbol.asyncDispose](): Promise<void> {
		await this.close();
	}

	/** @internal */
	openScheduler(place: PagedPlace): PagedScheduler {
		this.#checkOpen();
		return wrap(() => this.#native.openScheduler(place));
	}

	/** @internal */
	async openWorker(
		place: PagedPlace,
		workerId: number,
		layout: PagedLayout,
		timeoutMs: number,
	): Promise<PagedWorker> {
		this.#checkOpen();
		return await this.#native.openWorker(place, workerId, layout, timeoutMs);
	}

	/** @internal */
	async openPrefixCache(
		identity: Uint8Array,
		payloadBytes: number,
		options: WaitOptions,
	): Promise<NativePrefixCache> {
		this.#checkOpen();
		const timeoutMs = timeoutOf(options);
		return await waitFor(
			() => this.#native.openPrefixCache(identity, payloadBytes, timeoutMs),
			options.signal,
			(late) => late.close(timeoutMs),
		);
	}

	/**
	 * Why a prompt is no hit.
	 *
	 * @internal
	 */
	async explain(question: PromptQuestion, options: WaitOptions = {}): Promise<Explanation> {
		this.#checkOpen();
		const { modelName, kvWorldSize, tokens, cacheSalt } = question;
		const timeoutMs = timeoutOf(options);
		return await waitFor(
			() => this.#native.explain(modelName, kvWorldSize, tokens, cacheSalt, timeoutMs),
			options.signal,
		);
	}

	/**
	 * The leading chunks of a prompt that a lookup finds: all that LMCache's server can be asked.
	 *
	 * @internal
	 */
	async countHits(question: PromptQuestion, options: WaitOptions = {}): Promise<number> {
		this.#checkOpen();
		const { modelName, kvWorldSize, tokens, cacheSalt } = question;
		const timeoutMs = timeoutOf(options);
		return await waitFor(
			() => this.#native.countHits(modelName, kvWorldSize, tokens, cacheSalt, timeoutMs),
			options.signal,
		);
	}

	#checkOpen(): void {
		const { trouble } = this;
		if (trouble?.code === "CLOSED") {
			throw trouble;
		}
	}
}
