import { checkOptions, checkSalt, invalid, misnamedSalt, shown } from "../arguments.js";
import { REQUEST_OPTIONS, type RequestOptions } from "../cache.js";
import { type ErrorCode, fromNative, KvferryError } from "../errors.js";
import { throwIfAborted, timeoutOf } from "../waiting.js";

/** {@link RequestOptions}, with the defaults filled in. */
export interface Call {
	readonly salt: string;
	readonly timeoutMs: number;
	readonly signal: AbortSignal | undefined;
}

/** The calls of one engine's cache: their defaults, and the end that waits for them. */
export class Calls {
	readonly #defaults: RequestOptions;
	readonly #running = new Set<Promise<unknown>>();
	#closing: Promise<void> | undefined;

	constructor({ cacheSalt, timeoutMs }: RequestOptions) {
		this.#defaults = { cacheSalt, timeoutMs };
	}

	/**
	 * @param of The call.
	 * @param known The names of its options.
	 * @throws {@link KvferryError} `CLOSED`, `INVALID_SALT`, `INVALID_ARGUMENT`, `ABORTED`.
	 */
	begin(of: string, options: RequestOptions, known: Record<string, true> = REQUEST_OPTIONS): Call {
		if (this.#closing !== undefined) {
			throw new KvferryError("CLOSED", "The prefix cache was closed; open another one.");
		}
		checkOptions(of, options, known);
		const { cacheSalt = this.#defaults.cacheSalt, signal } = options;
		const { timeoutMs = this.#defaults.timeoutMs } = options;
		const call = { salt: checkSalt(cacheSalt), timeoutMs: timeoutOf({ timeoutMs }), signal };
		throwIfAborted(signal); // before anything is changed, and where nothing is waited for
		return call;
	}

	/** Runs a call that {@link Calls.close} waits for. */
	async track<T>(work: () => Promise<T>): Promise<T> {
		const call = work();
		this.#running.add(call);
		try {
			return await call;
		} finally {
			this.#running.delete(call);
		}
	}

	/** Lets no more calls begin, and runs `end` once after those under way. */
	close(end: () => Promise<void>): Promise<void> {
		this.#closing ??= Promise.allSettled(this.#running).then(end);
		return this.#closing;
	}
}

/** Checks an engine's own options, which it leaves alone if it does not know them: ours, written otherwise, would be, too. */
export function checkSpelling(of: string, options: object): void {
	for (const name of Object.keys(options)) {
		const plain = name.replaceAll(/[-_]/g, "").toLowerCase();
		const meant = Object.keys(REQUEST_OPTIONS).find((known) => known.toLowerCase() === plain);
		if (meant !== undefined && meant !== name) {
			throw invalid(`${of} has no option ${JSON.stringify(name)}: did you mean ${meant}?`);
		}
	}
	const salt = misnamedSalt(options);
	if (salt !== undefined) {
		throw invalid(`${of} has no option ${JSON.stringify(salt)}: did you mean cacheSalt?`);
	}
}

/**
 * What the caller did wrong is thrown; all else is trouble that a result tells. So is a client or a server that was closed:
 * what the engine computes needs neither. The cache's own end is thrown before, by {@link Calls.begin}.
 */
const MISUSE: ReadonlySet<ErrorCode> = new Set<ErrorCode>([
	"INVALID_ARGUMENT",
	"INVALID_TOKEN",
	"INVALID_SALT",
	"ABORTED",
]);

/** The trouble that `error` is; misuse is thrown on. */
export function troubleOf(error: unknown): KvferryError {
	const trouble = fromNative(error);
	if (MISUSE.has(trouble.code)) {
		throw trouble;
	}
	return trouble;
}

/** A copy: the engine works on it while the caller may change the original. */
export function toTokenIds(
	tokens: readonly number[] | readonly bigint[] | Uint32Array | BigInt64Array,
): Uint32Array {
	if (!Array.isArray(tokens) && !(ArrayBuffer.isView(tokens) && "length" in tokens)) {
		throw invalid(
			`tokens is ${shown(tokens)}: give an array of token ids, or a typed array of them`,
		);
	}
	// A loop: Uint32Array.from with a function takes half as long again.
	const ids = new Uint32Array(tokens.length);
	for (let i = 0; i < ids.length; i++) {
		const token: unknown = tokens[i];
		// Number() of null, "" and [] is 0, which is a token.
		const id = (typeof token === "bigint" ? Number(token) : token) as number;
		if (!(Number.isInteger(id) && id >= 0 && id < 2 ** 31)) {
			throw new KvferryError(
				"INVALID_TOKEN",
				`Token ${i} is ${typeof token === "bigint" ? token : shown(token)}: tokens are integers from 0 to 2147483647.`,
			);
		}
		ids[i] = id;
	}
	return ids;
}
