import { checkInteger, checkObject, checkText, checkTokenIds, invalid } from "../arguments.js";
import { namedSaltOf } from "../tracker.js";

const U32_MAX = 2 ** 32 - 1;

/** One load or store of a request. */
export interface LoadStoreOp {
	/**
	 * The request's tokens; the chunks' keys follow from those up to `end`. Operations of one request may share
	 * memory: read them only.
	 */
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

/**
 * What a step loads and stores: made by a scheduler, carried out by its workers. Plain data with typed arrays, which a
 * structured clone carries (worker threads; child processes with `serialization: "advanced"`), and JSON does not.
 */
export interface ConnectorMetadata {
	/** Loads first, older requests first. */
	readonly requests: readonly RequestMetadata[];
	/**
	 * Whether loads end between steps, told by the worker's `getFinished`; if not, before the step computes.
	 * Default true.
	 */
	readonly loadAsync?: boolean | undefined;
}

/**
 * The blocks that a load writes to: not those that the engine has whole itself. Where it is not known how many tokens a
 * block has, it may be one or a few of those as well.
 */
export function blocksToFill(
	{ start, end, blockIds, skipFirstNTokens }: LoadStoreOp,
	blockSize?: number,
): number[] {
	return blockIds.flatMap((blocks) => {
		// The last block may be missing, see `blockIds`, so a block has so many tokens at most.
		const size = blockSize ?? Math.floor((end - start) / blocks.length);
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
		return { ...request, cacheSalt: namedSaltOf(`the metadata of ${requestId}`, request) };
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
	for (const ids of blockIds) {
		for (const id of ids) {
			if (!Number.isInteger(id) || id < 0 || id >= U32_MAX) {
				checkInteger(`a block id of ${requestId}`, id, 0, U32_MAX - 1);
			}
		}
	}
}

/**
 * A request's tokens for its operations. They are copied once, into memory that the operations share, so that one
 * late in a long request costs no more than one of a short request.
 *
 * @internal
 */
export class SharedTokens {
	#copy = new Uint32Array(0);
	/** So many leading tokens were loaded or stored: they do not change any more. */
	#settled = 0;

	/** All of `tokenIds` as they are now, for an operation that ends at `end`. */
	of(tokenIds: readonly number[] | Uint32Array, end: number): readonly number[] | Uint32Array {
		const { length } = tokenIds;
		// Fewer are left when the memory was transferred away, or the request has become shorter.
		const settled = Math.min(this.#settled, this.#copy.length, length);
		this.#settled = settled;
		if (this.#copy.length < length) {
			const copy = new Uint32Array(length + (length >> 3));
			if (settled > 0) {
				copy.set(this.#copy.subarray(0, settled)); // throws when the memory is gone
			}
			this.#copy = copy;
		}
		if (tokenIds instanceof Uint32Array) {
			this.#copy.set(tokenIds.subarray(settled), settled);
		} else if (!copyTokens(tokenIds, settled, this.#copy)) {
			return tokenIds.slice(); // something is no token id: the worker says so
		}
		this.#settled = end;
		return this.#copy.subarray(0, length);
	}
}

/** Copies the tokens from `start` on to their places; whether all of them are token ids. */
function copyTokens(tokenIds: readonly number[], start: number, to: Uint32Array): boolean {
	for (let i = start; i < tokenIds.length; i++) {
		const token = tokenIds[i] as number;
		if (!Number.isInteger(token) || token < 0 || token > 2 ** 32 - 1) {
			return false;
		}
		to[i] = token;
	}
	return true;
}
