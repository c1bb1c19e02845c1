import { checkInteger, checkOptions } from "./arguments.js";
import type { KvEvents as NativeKvEvents } from "./native-binding.js";
import { timeoutOf, WAIT_OPTIONS, type WaitOptions, waitFor } from "./waiting.js";

/** Which events {@link Client.events} and {@link Server.events} tell. */
export interface EventsOptions extends WaitOptions {
	/**
	 * The sequence of the first event: {@link KvEvents.nextCursor} of the answer before. Default 0, the
	 * oldest event that is still known.
	 */
	readonly cursor?: number | undefined;
	/** Events at most, 1 to 16,384; fewer come when they are of very many tenants. Default 1,024. */
	readonly maxEvents?: number | undefined;
}

/** Some events of a cache, in their order and without gaps. */
export interface KvEvents {
	/** Random at each start of the cache, 32 hexadecimal digits. */
	readonly incarnation: string;
	/** The cursor to read on from. */
	readonly nextCursor: number;
	/** Whether events before these are gone: the cache keeps the latest 65,536. */
	readonly lost: boolean;
	/** Empty when there are no new ones. */
	readonly events: readonly KvEvent[];
}

/** A chunk of one KV rank became visible, or went. */
export interface KvEvent {
	/** Counted from 1 since the cache started. */
	readonly sequence: number;
	/** `removed`: it was evicted, cleared, or found damaged. */
	readonly kind: "stored" | "removed";
	/** The chunk's chained hash, 32 bytes; {@link chunkHashes} gives those of a prompt. */
	readonly chunkHash: Uint8Array;
	/** That of the chunk before it; undefined for a prompt's first, and when that one went before this one. */
	readonly parentChunkHash: Uint8Array | undefined;
	/** The model, as its engine registered it. */
	readonly modelName: string;
	/** KV shards of the model. */
	readonly kvWorldSize: number;
	/** The KV rank that stored it, from 0. */
	readonly kvWorkerId: number;
	/** The tenant; "" for none. */
	readonly cacheSalt: string;
	/** Milliseconds since 1970, by the clock of the cache's machine; the sequence tells the order. */
	readonly atMs: number;
}

const OPTIONS = {
	...WAIT_OPTIONS,
	cursor: true,
	maxEvents: true,
} satisfies Record<keyof EventsOptions, true>;

const MAX_EVENTS = 1024;

/** @internal */
export async function askEvents(
	ask: (cursor: number, max: number, timeoutMs: number) => Promise<NativeKvEvents>,
	options: EventsOptions,
): Promise<KvEvents> {
	checkOptions("events", options, OPTIONS);
	const { cursor = 0, maxEvents = MAX_EVENTS, signal } = options;
	checkInteger("cursor", cursor, 0, Number.MAX_SAFE_INTEGER);
	checkInteger("maxEvents", maxEvents, 1, 16_384);
	const timeoutMs = timeoutOf(options);
	const told = await waitFor(() => ask(cursor, maxEvents, timeoutMs), signal);
	const events = told.events.map((event) => ({
		...event,
		parentChunkHash: event.parentChunkHash ?? undefined,
	}));
	return { ...told, events };
}
