import { checkText } from "./arguments.js";
import { KvferryError, wrap } from "./errors.js";
import { native } from "./native.js";
import type {
	Client as NativeClient,
	PrefixCache as NativePrefixCache,
	PagedLayout,
	PagedPlace,
	PagedScheduler,
	PagedWorker,
} from "./native-binding.js";
import type { Status } from "./server.js";
import { timeoutOf, type WaitOptions, waitFor } from "./waiting.js";

/** Where a {@link Client} connects to. */
export interface ClientOptions extends WaitOptions {
	/** `tcp://host:port` or `host:port`, on this machine. Default "tcp://127.0.0.1:5555". */
	readonly url?: string;
}

/**
 * A connection to a cache server: kvferry's, or LMCache's in engine-driven mode with shared memory.
 *
 * It heals itself: when the server goes away, calls fail at once with `UNREACHABLE` and caches miss;
 * when it is back, the client registers and maps its memory again.
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
	/** Tokens of one chunk at the server. */
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
	 * @throws {@link KvferryError} `UNREACHABLE` when none listens, `TIMEOUT` when one does not answer,
	 * `UNSUPPORTED_OPTION` for another machine's address.
	 */
	static async connect(options: ClientOptions = {}): Promise<Client> {
		const { url = "tcp://127.0.0.1:5555", signal } = options;
		checkText("url", url);
		const timeoutMs = timeoutOf(options);
		const client = await waitFor(
			() => native().Client.connect(url, timeoutMs),
			signal,
			(late) => late.close(timeoutMs),
		);
		return new Client(client, url);
	}

	/** Asks the server for a sign of life; resolves to the milliseconds that it took. */
	async ping(options: WaitOptions = {}): Promise<number> {
		this.#checkOpen();
		const timeoutMs = timeoutOf(options);
		return await waitFor(() => this.#native.ping(timeoutMs), options.signal);
	}

	/**
	 * The server's figures, by name.
	 *
	 * @throws {@link KvferryError} `PROTOCOL` when the server is not kvferry's.
	 */
	async status(options: WaitOptions = {}): Promise<Status> {
		this.#checkOpen();
		const timeoutMs = timeoutOf(options);
		const figures = await waitFor(() => this.#native.status(timeoutMs), options.signal);
		return Object.fromEntries(figures);
	}

	/** Ends the connection. Calling it again does nothing. */
	async close(options: WaitOptions = {}): Promise<void> {
		const timeoutMs = timeoutOf(options);
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

	#checkOpen(): void {
		if (this.#closing !== undefined) {
			throw new KvferryError(
				"CLOSED",
				`The client of ${this.url} was closed; connect another one.`,
			);
		}
	}
}
