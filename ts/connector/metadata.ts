import { checkInteger, checkObject, checkText, checkTokenIds, invalid } from "../arguments.js";
import { saltOf } from "../tracker.js";

const U32_MAX = 2 ** 32 - 1;

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
	/** The tenant. Absent, null and "" are the same: none. */
	readonly cacheSalt?: string | null | undefined;
}

/** What a step loads and stores: made by a scheduler, carried out by its workers. Plain data. */
export interface ConnectorMetadata {
	/** Loads first, older requests first. */
	readonly requests: readonly RequestMetadata[];
	/**
	 * Whether loads end between steps, told by the worker's `getFinished`; if not, before the step computes.
	 * Default true.
	 */
	readonly loadAsync?: boolean | undefined;
}

/** The blocks that a load writes to: not those that the engine has whole itself. */
export function blocksToFill({ start, end, blockIds, skipFirstNTokens }: LoadStoreOp): number[] {
	return blockIds.flatMap((blocks) => {
		// The last block may be missing: see `blockIds`.
		const size = Math.floor((end - start) / blocks.length);
		return blocks.slice(Math.floor(skipFirstNTokens / size));
	});
}

/** A {@link RequestMetadata} with its salt, "" for none. */
export interface SaltedMetadata extends RequestMetadata {
	readonly cacheSalt: string;
}

/** Metadata, whoever made it, checked and with its defaults. */
export function readMetadata(metadata: ConnectorMetadata): {
	readonly requests: readonly SaltedMetadata[];
	readonly loadAsync: boolean;
} {
	if (!Array.isArray(metadata?.requests)) {
		throw invalid("metadata must be what buildConnectorMeta returned");
	}
	const { loadAsync = true } = metadata;
	if (typeof loadAsync !== "boolean") {
		throw invalid("loadAsync of the metadata must be true or false");
	}
	const requests = metadata.requests.map((request): SaltedMetadata => {
		checkObject("a request of the metadata", request);
		const { requestId, direction, op } = request;
		checkText("requestId of the metadata", requestId);
		if (direction !== "RETRIEVE" && direction !== "STORE") {
			throw invalid(
				`direction of ${requestId} is ${String(direction)}: it must be "RETRIEVE" or "STORE"`,
			);
		}
		checkOperation(requestId, op);
		return { ...request, cacheSalt: saltOf(request) };
	});
	return { requests, loadAsync };
}

/** Refuses an operation that means nothing, whatever the engine's memory is. */
export function checkOperation(requestId: string, op: LoadStoreOp): void {
	checkObject(`op of ${requestId}`, op);
	const { tokenIds, start, end, blockIds, skipFirstNTokens } = op;
	checkTokenIds(`tokenIds of ${requestId}`, tokenIds);
	checkInteger(`end of ${requestId}`, end, 0, Math.min(tokenIds.length, U32_MAX));
	checkInteger(`start of ${requestId}`, start, 0, end);
	checkInteger(`skipFirstNTokens of ${requestId}`, skipFirstNTokens, 0, end - start);
	if (!Array.isArray(blockIds) || !blockIds.every((ids) => Array.isArray(ids))) {
		throw invalid(`blockIds of ${requestId} must be an array of block ids for each KV group`);
	}
	for (const id of blockIds.flat()) {
		checkInteger(`a block id of ${requestId}`, id, 0, U32_MAX - 1);
	}
}
