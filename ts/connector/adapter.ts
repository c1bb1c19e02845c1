/** Options of the calls that name tokens. */
export interface SaltOption {
	/** The tenant. Absent for none. */
	readonly cacheSalt?: string | undefined;
}

/** Blocks that a step gave to a request. */
export interface BlockAllocation {
	readonly requestId: string;
	/** The new blocks, for each KV group. */
	readonly newBlockIds: readonly (readonly number[])[];
	/** The tokens that lie in them, as far as they are known. */
	readonly newTokenIds: readonly number[];
}

/**
 * What a scheduler asks a cache. Users may bring their own; none of the calls waits, and none throws for
 * trouble with the cache: what is not known is not there.
 */
export interface SchedulerAdapter {
	/** Tokens of a chunk. */
	readonly chunkSize: number;
	/**
	 * Whether every call passes salts on. Without it, requests with a salt are computed without the cache.
	 */
	readonly carriesSalt?: boolean | undefined;
	/** Begins to look up a request's tokens, unless that was begun already. */
	maybeSubmitLookupRequest(
		requestId: string,
		tokenIds: readonly number[] | Uint32Array,
		options?: SaltOption,
	): void;
	/** Leading tokens that the cache has, in whole chunks; `null` while that is not known. They are leased. */
	checkLookupResult(requestId: string): number | null;
	/** The lookup's result will not be asked for again. */
	cleanupLookupResult(requestId: string): void;
	/**
	 * Ends the leases of the chunks that lie wholly in `start..end` (tokens): the engine has them itself.
	 */
	freeLookupLocks(
		requestId: string,
		tokenIds: readonly number[] | Uint32Array,
		start: number,
		end: number,
		options?: SaltOption,
	): void;
	/** The request has ended: the cache may forget what it remembers of it. */
	endSession(requestId: string): void;
	/** Tells which blocks a step gave out, for whoever routes requests by them. */
	reportBlockAllocations?(allocations: readonly BlockAllocation[]): void;
}
