/** One load or store of a request. */
export interface LoadStoreOp {
	/** The request's tokens; the chunks' keys follow from those up to `end`. */
	readonly tokenIds: readonly number[] | Uint32Array;
	/** First token, a multiple of the chunk size. */
	readonly start: number;
	/** Token after the last, a multiple of the chunk size. */
	readonly end: number;
	/** The blocks of the range, for each KV group; fewer when the request has fewer. */
	readonly blockIds: readonly (readonly number[])[];
	/** Tokens at the start that the engine has itself, and that must not be overwritten. */
	readonly skipFirstNTokens: number;
}

/** What a worker does for one request. */
export interface RequestMetadata {
	readonly requestId: string;
	readonly direction: "RETRIEVE" | "STORE";
	readonly op: LoadStoreOp;
	/** The tenant; "" for none. */
	readonly cacheSalt: string;
}

/** What a step loads and stores: made by a scheduler, carried out by its workers. Plain data. */
export interface ConnectorMetadata {
	/** Loads first, older requests first. */
	readonly requests: readonly RequestMetadata[];
	/** Whether loads end between steps, told by the worker's `getFinished`; if not, before the step computes. */
	readonly loadAsync: boolean;
}

/** The blocks that a load writes to: not those that the engine has whole itself. */
export function blocksToFill({ start, end, blockIds, skipFirstNTokens }: LoadStoreOp): number[] {
	return blockIds.flatMap((blocks) => {
		// The last block may be missing: see `blockIds`.
		const size = Math.floor((end - start) / blocks.length);
		return blocks.slice(Math.floor(skipFirstNTokens / size));
	});
}
