import { randomBytes } from "node:crypto";
import { setTimeout } from "node:timers/promises";
import { invalid } from "../arguments.js";
import { PrefixCache, type RequestOptions } from "../cache.js";
import { Client } from "../client.js";
import { KvferryError } from "../errors.js";
import { Server, type Status } from "../server.js";
import { tokenOf } from "../token.js";
import { askHttp } from "./http.js";
import { type BenchOptions, benchOptions } from "./options.js";
import { columns, size } from "./units.js";

/** Chunks of a prompt. */
const PROMPT = 16;
const PINGS = 200;
/** How long what is to be saved on the disk is waited for at the end. */
const SAVED_MS = 30_000;
/** Between two tries to store what had no room, at most. */
const PAUSE_MS = 16;

/** What an operation took. */
interface Row {
	readonly operation: string;
	readonly count: number;
	readonly p50Ms: number;
	readonly p99Ms: number;
	/** Of the bytes that moved, by all the time that it took. */
	readonly bytesPerSecond?: number;
}

interface Measured {
	readonly rows: Row[];
	/** Nothing was cleared afterwards. */
	readonly left: boolean;
}

/** `kvferry bench`: stores, looks up and loads through a server, and leaves nothing of it there. */
export async function bench(args: string[]): Promise<void> {
	const options = benchOptions(args);
	const stop = new AbortController();
	const end = () => stop.abort();
	process.once("SIGINT", end).once("SIGTERM", end);
	try {
		const { url, rows, left } =
			options.url === undefined
				? await onOwnServer(options, stop.signal)
				: { url: options.url, ...(await measure(options.url, options, stop.signal)) };
		const { bytes, chunkBytes } = options;
		if (options.json) {
			process.stdout.write(`${JSON.stringify({ url, bytes, chunkBytes, rows, cleared: !left })}\n`);
			return;
		}
		const shown = rows.map(({ operation, count, p50Ms, p99Ms, bytesPerSecond }) => [
			operation,
			String(count),
			`${p50Ms.toFixed(3)} ms`,
			`${p99Ms.toFixed(3)} ms`,
			bytesPerSecond === undefined ? "" : `${size(bytesPerSecond)}/s`,
		]);
		const head = ["operation", "count", "half within", "99 of 100 within", "rate"];
		process.stdout.write(
			`${columns([head, ...shown])}prompts of ${PROMPT} chunks of ${size(chunkBytes)} at ${url}; ` +
				(left
					? "it was not cleared: --http is another server's, or it is still being saved, or gone by itself\n"
					: "nothing of it is left there\n"),
		);
	} catch (error) {
		throw stop.signal.aborted ? stopped(error) : error;
	} finally {
		process.off("SIGINT", end).off("SIGTERM", end);
	}
}

/** The error of a benchmark that was stopped; what could not be cleared then, its own says. */
function stopped(cause: unknown): KvferryError {
	return cause instanceof KvferryError && cause.code === "ABORTED"
		? cause
		: new KvferryError("ABORTED", "stopped; nothing of it is left on the server", { cause });
}

async function onOwnServer(
	options: BenchOptions,
	signal: AbortSignal,
): Promise<{ url: string } & Measured> {
	process.env.KVFERRY_TOKEN = ""; // another server's
	const memory = 2 * options.bytes + 2 ** 24;
	await using server = await Server.start({ port: 0, httpPort: 0, memory, signal });
	const url = `tcp://${server.address}`;
	const http = new URL(`http://${server.httpAddress}`);
	return { url: "a server of its own", ...(await measure(url, { ...options, http }, signal)) };
}

async function measure(url: string, options: BenchOptions, signal: AbortSignal): Promise<Measured> {
	const { bytes, chunkBytes, timeoutMs, http } = options;
	// How it is cleared afterwards must be known before.
	const { default: quota } = await askHttp(options, "/quotas", undefined, "memory_bytes");
	const { cap = null } = (quota ?? {}) as { cap?: number | null };
	const token = tokenOf(options, ["admin", "data"]);
	await using client = await Client.connect({ url, timeoutMs, token });
	const status = await client.status({ timeoutMs });
	const { pid } = await askHttp(options, "/status", undefined, "pid");
	if (pid !== status.pid) {
		throw invalid(
			`--http ${http.origin} is process ${pid}, and --url ${url} process ${status.pid}: what is stored could not be ` +
				"cleared; give the --http of that server.",
		);
	}
	const free = Number(status.pool_bytes) - Number(status.used_bytes);
	if (free < 2 * bytes) {
		throw invalid(
			`--size ${size(bytes)}: the server has ${size(free)} of memory free, and nothing of others is to ` +
				"go for a benchmark; give half of that at most.",
		);
	}
	if (cap !== null && cap < PROMPT * roomOf(chunkBytes, client.chunkSize)) {
		throw invalid(
			`--chunk-bytes ${size(chunkBytes)}: ${PROMPT} of them make a prompt, and each tenant may have ${size(cap)} ` +
				"of the server's memory (kvferry quota); give less.",
		);
	}
	const salt = `kvferry-bench-${randomBytes(8).toString("hex")}`;
	let rows: Row[] = [];
	let failure: unknown;
	try {
		rows = await run(client, salt, options, signal);
	} catch (error) {
		failure = error;
	}
	let cleared = 0;
	try {
		cleared = await clear(client, salt, options);
	} catch (cause) {
		const why = signal.aborted
			? new KvferryError("ABORTED", "stopped")
			: ((failure ?? cause) as Error);
		const body = JSON.stringify({ confirm: true, salt });
		throw new KvferryError(
			why instanceof KvferryError ? why.code : "INTERNAL",
			`${why.message}; it could not be cleared (${(cause as Error).message}), and what was stored may still be there: ` +
				`curl ${http.origin}/clear -H content-type:application/json -d '${body}' removes it, with the admin token where there are tokens`,
			{ cause },
		);
	}
	if (failure !== undefined) {
		throw failure;
	}
	return { rows, left: cleared === 0 };
}

async function run(
	client: Client,
	cacheSalt: string,
	{ bytes, chunkBytes, timeoutMs }: BenchOptions,
	signal: AbortSignal,
): Promise<Row[]> {
	await using cache = await PrefixCache.open({
		via: client,
		identity: "kvferry-bench",
		bytesPerChunk: chunkBytes,
		timeoutMs,
	});
	const tokens = (prompt: number) =>
		Uint32Array.from({ length: PROMPT * cache.chunkSize }, (_, at) => (at === 0 ? prompt : at));
	const prompts = Math.max(1, Math.floor(bytes / (PROMPT * chunkBytes)));
	const content = randomBytes(chunkBytes);
	const into = Array.from({ length: PROMPT }, () => new Uint8Array(chunkBytes));
	const took: Record<string, number[]> = { ping: [], miss: [], store: [], lookup: [], load: [] };
	const time = async <T>(operation: string, what: () => Promise<T>): Promise<T> => {
		signal.throwIfAborted();
		const began = performance.now();
		const result = await what();
		took[operation]?.push(performance.now() - began);
		return result;
	};
	for (let ping = 0; ping < PINGS; ping++) {
		await time("ping", () => client.ping({ timeoutMs }));
	}
	const request = { cacheSalt, timeoutMs };
	for (let prompt = 0; prompt < prompts; prompt++) {
		const ids = tokens(prompt);
		const miss = await time("miss", () => cache.lookup(ids, request));
		await miss.close();
		throwFailure(miss);
		const missing = await time("store", () =>
			storeWhole(cache, ids, () => content, { ...request, signal }),
		);
		if (missing > 0) {
			throw noRoom(missing, await client.status({ timeoutMs }), timeoutMs);
		}
		const hit = await time("lookup", () => cache.lookup(ids, request));
		const loaded = await time("load", () => hit.load((chunk) => into[chunk] ?? new Uint8Array(0)));
		throwFailure(hit);
		if (loaded.length < PROMPT || loaded.some((chunk) => !content.equals(chunk))) {
			throw new KvferryError("PROTOCOL", "what was stored did not come back: see kvferry doctor");
		}
	}
	return Object.entries(took).map(([operation, times]) => {
		const sorted = times.toSorted((a, b) => a - b);
		const at = (part: number) =>
			sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))] ?? 0;
		const seconds = times.reduce((sum, ms) => sum + ms, 0) / 1e3;
		const moved =
			operation === "store" || operation === "load" ? times.length * PROMPT * chunkBytes : 0;
		return {
			operation,
			count: times.length,
			p50Ms: at(0.5),
			p99Ms: at(0.99),
			...(moved > 0 ? { bytesPerSecond: moved / seconds } : {}),
		};
	});
}

/** What a chunk takes of the pool: its header too, in whole tokens and pages. */
function roomOf(chunkBytes: number, chunkSize: number): number {
	return Math.ceil((Math.ceil((chunkBytes + 64) / chunkSize) * chunkSize) / 4096) * 4096;
}

/** What failed is no figure. */
function throwFailure({ failure }: { readonly failure?: KvferryError | undefined }): void {
	if (failure !== undefined) {
		throw failure;
	}
}

/**
 * Stores a prompt, and again what had no room: a pool grows while it is filled, and on a busy machine it is a moment late.
 *
 * @returns Chunks that had no room within the timeout.
 * @throws Why the cache failed, if it did.
 */
export async function storeWhole(
	cache: PrefixCache,
	tokens: Uint32Array,
	bytesOf: (chunk: number) => Uint8Array,
	options: RequestOptions & { readonly timeoutMs: number },
): Promise<number> {
	const until = performance.now() + options.timeoutMs;
	let missing = Math.floor(tokens.length / cache.chunkSize);
	for (let pause = 1; ; pause = Math.min(2 * pause, PAUSE_MS)) {
		const stored = await cache.store(tokens, bytesOf, options);
		throwFailure(stored);
		missing -= stored.storedChunks;
		if (missing <= 0 || performance.now() + pause >= until) {
			return missing;
		}
		await setTimeout(pause, undefined, { signal: options.signal });
	}
}

/** Why chunks had no room, by the server's figures. */
export function noRoom(missing: number, status: Status, timeoutMs: number): KvferryError {
	const [reserved, pool] = [Number(status.reserved_bytes), Number(status.pool_bytes)];
	const has = `${size(reserved)} of ${size(pool)}`;
	if (Number(status.growth_failed) > 0) {
		return new KvferryError(
			"POOL_TOO_LARGE",
			`the server's memory has ${has}, and shared memory ran out: enlarge /dev/shm (in a container: --shm-size)`,
		);
	}
	const why =
		reserved < pool
			? `its memory grows while it is filled, and has only ${has} yet, as on a busy machine: give a longer --timeout-ms`
			: `all ${size(pool)} are used, or held by others: give less --size, or a longer --timeout-ms`;
	return new KvferryError(
		"TIMEOUT",
		`${missing} of ${PROMPT} chunks had no room at the server within ${timeoutMs} ms; ${why}`,
	);
}

/** What is being saved stays until it is. */
async function clear(client: Client, salt: string, options: BenchOptions): Promise<number> {
	const { timeoutMs } = options;
	const until = performance.now() + SAVED_MS;
	while (performance.now() < until) {
		const status = await client.status({ timeoutMs });
		const waiting = Number(status.disk_queue_bytes ?? 0) + Number(status.remote_queue_bytes ?? 0);
		if (waiting === 0) {
			break;
		}
		await setTimeout(50);
	}
	const body = { confirm: true, salt };
	const { cleared } = await askHttp(options, "/clear", { method: "POST", body }, "cleared");
	return Number(cleared);
}
