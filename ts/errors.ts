/**
 * The closed set of error codes. `code` is what programs match on; the message, for a person,
 * names the refused value and the remedy.
 */
export const ErrorCodes = {
	/** An argument is of the wrong type or out of its range. A retry fails again. */
	INVALID_ARGUMENT: "INVALID_ARGUMENT",
	/** A token id is not an integer or out of range; the message names its position. A retry fails again. */
	INVALID_TOKEN: "INVALID_TOKEN",
	/** A salt holds a forbidden character or is too long. A retry fails again. */
	INVALID_SALT: "INVALID_SALT",
	/** An engine's state file does not follow its grammar. A retry fails again. */
	INVALID_STATE: "INVALID_STATE",
	/** The model cannot be cached (sliding window, recurrent state). A retry fails again. */
	UNSUPPORTED_MODEL: "UNSUPPORTED_MODEL",
	/** Part of the cache's identity can neither be read from the engine nor was passed in. Pass it in. */
	IDENTITY_UNKNOWN: "IDENTITY_UNKNOWN",
	/** The platform lacks what the call needs, or the addon's binary is missing. A retry fails again. */
	UNSUPPORTED_PLATFORM: "UNSUPPORTED_PLATFORM",
	/** An option that this version does not offer. A retry fails again. */
	UNSUPPORTED_OPTION: "UNSUPPORTED_OPTION",
	/** The handle was closed. Open a new one. */
	CLOSED: "CLOSED",
	/** The caller's own signal aborted the call. */
	ABORTED: "ABORTED",
	/** The deadline passed before the answer came. A retry may help. */
	TIMEOUT: "TIMEOUT",
	/** No server answers at the address. A retry helps once one does. */
	UNREACHABLE: "UNREACHABLE",
	/** The server wants a token, or another one than was given. */
	UNAUTHORIZED: "UNAUTHORIZED",
	/** The peer broke the protocol or speaks another version. A retry fails again. */
	PROTOCOL: "PROTOCOL",
	/** Another process listens at the address. Choose another port or end that process. */
	ADDRESS_IN_USE: "ADDRESS_IN_USE",
	/** Another live server owns the shared-memory pool of this name. Choose another name. */
	POOL_IN_USE: "POOL_IN_USE",
	/** Another live process has the disk tier's directory. Choose another directory or end that process. */
	DISK_IN_USE: "DISK_IN_USE",
	/** Shared memory cannot hold the pool; the message has both sizes. Ask for less or enlarge it. */
	POOL_TOO_LARGE: "POOL_TOO_LARGE",
	/** There is no usable CUDA driver, device or symbol; the message says which, and the remedy. */
	CUDA_UNAVAILABLE: "CUDA_UNAVAILABLE",
	/** A call of the CUDA driver failed; the message names it, CUDA's error and what it means. */
	CUDA_FAILED: "CUDA_FAILED",
	/** The operating system refused; the message has its reason. A retry helps only if that reason went away. */
	SYSTEM: "SYSTEM",
	/** A bug in kvferry. Please report it with its message. */
	INTERNAL: "INTERNAL",
} as const;

/** One of {@link ErrorCodes}. */
export type ErrorCode = keyof typeof ErrorCodes;

const RETRYABLE: ReadonlySet<ErrorCode> = new Set<ErrorCode>(["TIMEOUT", "UNREACHABLE"]);

/** Shared by all copies of this module: an application may load the ESM and the CommonJS build. */
const BRAND = Symbol.for("kvferry.KvferryError");

/** The root of everything that kvferry throws. */
export class KvferryError extends Error {
	/** What went wrong. */
	readonly code: ErrorCode;
	/** Whether the same call may succeed later with nothing changed by the caller. */
	readonly retryable: boolean;

	/**
	 * @param code What went wrong.
	 * @param message The refused value and the remedy, for a person.
	 * @param options The `cause`, if another error led to this one.
	 */
	constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
		super(message, options);
		this.code = code;
		this.retryable = RETRYABLE.has(code);
	}

	/** Whether `value` is a KvferryError, of whichever build of this module. */
	static override [Symbol.hasInstance](value: unknown): boolean {
		return typeof value === "object" && value !== null && BRAND in value;
	}
}

Object.defineProperties(KvferryError.prototype, {
	name: { value: "KvferryError", configurable: true, writable: true },
	[BRAND]: { value: true },
});

/**
 * Turns what a native call threw into a {@link KvferryError}: the addon's reasons read
 * `CODE: message`, a refused conversion has napi's own status, and all else is a bug.
 *
 * @internal
 */
export function fromNative(error: unknown): KvferryError {
	if (error instanceof KvferryError) {
		return error as KvferryError;
	}
	const message = error instanceof Error ? error.message : String(error);
	const colon = message.indexOf(": ");
	const code = message.slice(0, Math.max(colon, 0));
	if (isErrorCode(code)) {
		return new KvferryError(code, message.slice(colon + 2), { cause: error });
	}
	return new KvferryError(isRefusedConversion(error) ? "INVALID_ARGUMENT" : "INTERNAL", message, {
		cause: error,
	});
}

/**
 * Runs a native call and throws its errors as {@link KvferryError}.
 *
 * @internal
 */
export function wrap<T>(call: () => T): T {
	try {
		return call();
	} catch (error) {
		throw fromNative(error);
	}
}

function isErrorCode(code: string): code is ErrorCode {
	return Object.hasOwn(ErrorCodes, code);
}

/** napi's statuses for an argument of the wrong JavaScript type end in `Expected` or are `InvalidArg`. */
function isRefusedConversion(error: unknown): boolean {
	const status = (error as { code?: unknown } | null)?.code;
	return typeof status === "string" && /^InvalidArg$|Expected$/.test(status);
}
