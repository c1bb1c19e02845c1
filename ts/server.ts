import { stat } from "node:fs/promises";
import {
	checkBoolean,
	checkGiven,
	checkInteger,
	checkOptions,
	checkText,
	invalid,
} from "./arguments.js";
import { KvferryError, wrap } from "./errors.js";
import { askEvents, type EventsOptions, type KvEvents } from "./events.js";
import { native } from "./native.js";
import type {
	PrefixCache as NativePrefixCache,
	Server as NativeServer,
	Note,
	PagedLayout,
	PagedPlace,
	PagedScheduler,
	PagedWorker,
} from "./native-binding.js";
import { timeoutOf, type WaitOptions, waitFor } from "./waiting.js";

/** Which chunks go first, see {@link ServerOptions.policy}. */
export type EvictionPolicy = "default" | "lru" | "arc" | "s3fifo";

/** How a {@link Server} is set up. */
export interface ServerOptions extends Pick<WaitOptions, "signal"> {
	/**
	 * Whether other processes may connect. Without it the cache is this process's own: no socket, and
	 * no shared memory, and options about these are refused. Default true.
	 */
	readonly listen?: boolean;
	/**
	 * A loopback address or "localhost"; with {@link ServerOptions.listenPublic} and {@link ServerOptions.tokenFile} any
	 * address of this machine, "0.0.0.0" for all. Default "127.0.0.1".
	 */
	readonly host?: string;
	/** Whether {@link ServerOptions.host} may be reached from other machines: read docs/security.md first. Default false. */
	readonly listenPublic?: boolean;
	/**
	 * A file with the tokens that peers and operators are let in for: lines `data = TOKEN`, `admin = TOKEN` and `metrics
	 * = TOKEN`, of 32 to 255 characters, for its owner's eyes only. Default: none, and whoever reaches the server may do
	 * everything.
	 */
	readonly tokenFile?: string;
	/**
	 * An absolute path where a Unix socket is made beside the port, `ipc://` and the path for peers; its directory is its
	 * owner's only (mode 0700), and made where it is missing. Default: none.
	 */
	readonly ipc?: string;
	/** 0 to 65535; 0 takes a free one, see {@link Server.address}. Default 5555. */
	readonly port?: number;
	/**
	 * 0 to 65535: where operators ask for health, metrics and a page, on the same host; 0 takes a free
	 * one, see {@link Server.httpAddress}. Default: no HTTP.
	 */
	readonly httpPort?: number;
	/**
	 * Bytes of the pool, 4096 to 2^44 - 4096, of which the system gives as many as are used; all of them where the paged connectors copy
	 * from and to a GPU. Default 4 GiB.
	 */
	readonly memory?: number;
	/**
	 * Name of the pool in shared memory, 1 to 200 bytes without "/"; `kvferry_` is put before it where
	 * it is missing. Default: by the port.
	 */
	readonly shmName?: string;
	/**
	 * What goes when room is needed: "default" learns from the requests what is likely to be used again, "lru" is the
	 * least recently used; "arc" and "s3fifo" are the published algorithms.
	 */
	readonly policy?: EvictionPolicy;
	/**
	 * A directory, made where it is missing, in which chunks stay when memory has no room for them, and over restarts. One
	 * process at a time has it. Default: none.
	 */
	readonly disk?: string;
	/** Bytes that the files in {@link ServerOptions.disk} may take, 8192 to 2^53 - 1; refused without it. Default 20 GiB. */
	readonly diskSize?: number;
	/**
	 * URL of a Redis or S3 that several servers share: what one stored, the others find. `redis://host:6379/0`,
	 * `rediss://…`, `redis+cluster://a:6379,b:6379`, or `s3://bucket/prefix?region=…&endpoint=…`; credentials come from the
	 * environment. While it does not answer, the server goes on without. Default: none.
	 */
	readonly remote?: string;
	/**
	 * The file of what each tenant may have of the memory, as JSON; it need not be there yet. What is changed over HTTP is
	 * written to it. Default: none, and quotas end with the server.
	 */
	readonly quotas?: string;
	/** Tokens of one chunk, 1 to 65536. Default 256. */
	readonly chunkSize?: number;
	/**
	 * Milliseconds after which a request that was looked up and then not used any more loses its hold on
	 * the chunks, 1 to 2^31 - 1. Default 300,000.
	 */
	readonly sessionTimeoutMs?: number;
	/**
	 * Milliseconds from reserving room to making it visible, 1 to 2^31 - 1. After them others may store
	 * the same chunks; the room itself stays the slow writer's until it says that it is done, or its
	 * connection ends. Default 600,000.
	 */
	readonly reservationTimeoutMs?: number;
	/** Whether the server keeps the process running until it is closed. Default: as `listen`. */
	readonly keepAlive?: boolean;
}

const OPTIONS = {
	listen: true,
	host: true,
	listenPublic: true,
	tokenFile: true,
	ipc: true,
	port: true,
	httpPort: true,
	memory: true,
	shmName: true,
	policy: true,
	disk: true,
	diskSize: true,
	remote: true,
	quotas: true,
	chunkSize: true,
	sessionTimeoutMs: true,
	reservationTimeoutMs: true,
	keepAlive: true,
	signal: true,
} satisfies Record<keyof ServerOptions, true>;

/** Options that say how others reach the server. */
const LISTENING = [
	"host",
	"listenPublic",
	"tokenFile",
	"ipc",
	"port",
	"httpPort",
	"shmName",
] as const satisfies (keyof ServerOptions)[];

/** Figures of a server by name: counts, bytes, seconds and words. */
export type Status = Record<string, number | string>;

const MEMORY = 4 * 2 ** 30;
const DISK = 20 * 2 ** 30;
/** Of a timer that does nothing but hold a server, and the process with it. */
const HELD_MS = 2 ** 30;

/**
 * A cache server in this process: for other processes, or for this one alone.
 *
 * @example
 * ```ts
 * const server = await Server.start({ memory: 2 ** 30 });
 * console.log(server.address); // "127.0.0.1:5555"
 * ```
 */
export class Server implements AsyncDisposable {
	/** Tokens of one chunk. */
	readonly chunkSize: number;
	readonly #native: NativeServer;
	#timer: NodeJS.Timeout | undefined;
	#closing: Promise<void> | undefined;

	private constructor(server: NativeServer, chunkSize: number) {
		this.#native = server;
		this.chunkSize = chunkSize;
	}

	/** A server that listens does so until it is closed, also when nothing refers to it. */
	#hold(keepAlive: boolean): void {
		this.#timer = setInterval(() => this, HELD_MS);
		if (!keepAlive) {
			this.#timer.unref();
		}
	}

	/**
	 * Starts a server.
	 *
	 * @throws {@link KvferryError} `ADDRESS_IN_USE` (of either port), `POOL_IN_USE`, `POOL_TOO_LARGE` (with what shared
	 * memory has free), `DISK_IN_USE`, `UNSUPPORTED_OPTION` for a host that is not loopback without what that needs,
	 * `INVALID_ARGUMENT` for a remote's URL that is none, `INVALID_ARGUMENT` or `INVALID_SALT` for what is wrong in the file of
	 * quotas or of tokens.
	 */
	static async start(options: ServerOptions = {}): Promise<Server> {
		checkOptions("Server.start", options, OPTIONS);
		const { listen = true, host = "127.0.0.1", port = 5555, memory = MEMORY } = options;
		const { httpPort, shmName, chunkSize = 256, keepAlive = listen, signal } = options;
		const { policy = "default", disk, diskSize = DISK, remote, quotas } = options;
		const { listenPublic = false, tokenFile, ipc } = options;
		const { sessionTimeoutMs = 300_000, reservationTimeoutMs = 600_000 } = options;
		checkBoolean("listen", listen);
		checkBoolean("keepAlive", keepAlive);
		checkText("host", host);
		checkInteger("port", port, 0, 65_535);
		checkInteger("memory", memory, 4096, 2 ** 44 - 4096);
		checkInteger("chunkSize", chunkSize, 1, 65_536);
		checkText("policy", policy);
		checkInteger("diskSize", diskSize, 8192, Number.MAX_SAFE_INTEGER);
		if (disk !== undefined) {
			checkGiven("disk", disk);
		} else if (options.diskSize !== undefined) {
			throw invalid(`diskSize ${diskSize} has no use here: give the directory, disk, too`);
		}
		if (remote !== undefined) {
			checkGiven("remote", remote);
		}
		if (quotas !== undefined) {
			checkGiven("quotas", quotas);
		}
		checkInteger("sessionTimeoutMs", sessionTimeoutMs, 1, 2 ** 31 - 1);
		checkInteger("reservationTimeoutMs", reservationTimeoutMs, 1, 2 ** 31 - 1);
		if (shmName !== undefined) {
			checkGiven("shmName", shmName);
		}
		checkBoolean("listenPublic", listenPublic);
		for (const [name, path] of Object.entries({ tokenFile, ipc })) {
			if (path !== undefined) {
				checkText(name, path);
			}
		}
		if (httpPort !== undefined) {
			checkInteger("httpPort", httpPort, 0, 65_535);
		}
		const given = LISTENING.find((name) => (options[name] ?? false) !== false);
		if (!listen && given !== undefined) {
			const value = JSON.stringify(options[given]);
			throw invalid(`${given} is ${value}, with listen: false; leave one of them out`);
		}
		if (disk !== undefined && (await stat(disk).catch(() => undefined))?.isFile()) {
			throw invalid(`disk ${disk} is a file: give a directory, which is made where it is missing`);
		}
		const started = await waitFor(
			() =>
				native().Server.start({
					memory,
					port,
					chunkSize,
					policy,
					diskSize,
					...(disk === undefined ? {} : { disk }),
					...(remote === undefined ? {} : { remote }),
					...(quotas === undefined ? {} : { quotas }),
					sessionTimeoutMs,
					reservationTimeoutMs,
					...(listen ? { host } : {}),
					listenPublic,
					...(tokenFile === undefined ? {} : { tokenFile }),
					...(ipc === undefined ? {} : { ipc }),
					...(shmName === undefined ? {} : { shmName }),
					...(httpPort === undefined ? {} : { httpPort }),
				}),
			signal,
			(late) => late.close(),
		);
		const server = new Server(started, chunkSize);
		if (listen || keepAlive) {
			server.#hold(keepAlive);
		}
		return server;
	}

	/** `host:port` where it listens; undefined when it does not. */
	get address(): string | undefined {
		return this.#native.address ?? undefined;
	}

	/** `host:port` of HTTP; undefined when there is none. */
	get httpAddress(): string | undefined {
		return this.#native.httpAddress ?? undefined;
	}

	/** Name of the pool in shared memory; undefined when it is this process's own memory. */
	get shmName(): string | undefined {
		return this.#native.shmName || undefined;
	}

	/**
	 * Why nothing can be asked of it: caches on it keep its memory, and none of what it promises.
	 *
	 * @internal
	 */
	get trouble(): KvferryError | undefined {
		return this.#closing !== undefined
			? new KvferryError("CLOSED", "The server was closed; start another one.")
			: undefined;
	}

	/** Figures of the store, by name. */
	status(): Status {
		return Object.fromEntries(wrap(() => this.#native.status()));
	}

	/** @internal What happened since this was asked last, for a log. */
	takeNotes(): Note[] {
		return wrap(() => this.#native.takeNotes());
	}

	/**
	 * What became visible in the cache and what went, for an index of one's own: ask again from
	 * `nextCursor`. Another `incarnation`, or `lost`, means that the index is void: begin a new one,
	 * without a cursor. Chunks whose events are no longer kept are not told of.
	 *
	 * **WARNING** Events name the tenants' salts.
	 */
	async events(options: EventsOptions = {}): Promise<KvEvents> {
		return await askEvents((cursor, max) => this.#native.events(cursor, max), options);
	}

	/**
	 * Ends all connections and drops what is in memory; before, what is not on the disk or in the remote yet is
	 * written, for 30 seconds at most. Calling it again waits for the same.
	 */
	async close(): Promise<void> {
		clearInterval(this.#timer);
		this.#closing ??= waitFor(() => this.#native.close(), undefined);
		await this.#closing;
	}

	/** The same as {@link Server.close}. */
	async [Symbol.asyncDispose](): Promise<void> {
		await this.close();
	}

	/** @internal */
	openScheduler(place: PagedPlace): PagedScheduler {
		return wrap(() => this.#native.openScheduler(place));
	}

	/** @internal */
	async openWorker(
		place: PagedPlace,
		workerId: number,
		layout: PagedLayout,
		timeoutMs: number,
	): Promise<PagedWorker> {
		return await this.#native.openWorker(place, workerId, layout, timeoutMs);
	}

	/** @internal */
	openPrefixCache(
		identity: Uint8Array,
		payloadBytes: number,
		options: WaitOptions,
	): Promise<NativePrefixCache> {
		const timeoutMs = timeoutOf(options);
		return waitFor(
			() => this.#native.openPrefixCache(identity, payloadBytes, timeoutMs),
			options.signal,
			(late) => late.close(timeoutMs),
		);
	}
}
