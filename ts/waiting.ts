import { checkInteger, checkOptions, invalid } from "./arguments.js";
import { fromNative, KvferryError } from "./errors.js";

/** Options of every call that waits. */
export interface WaitOptions {
	/**
	 * Ends the wait with `ABORTED`. What the call had taken (leases, reserved room) is given back, as
	 * soon as a copy that is under way has ended.
	 */
	readonly signal?: AbortSignal | undefined;
	/**
	 * Milliseconds, 1 to 2^31 - 1, after which a wait for the cache ends with `TIMEOUT`. A call may wait
	 * more than once: a store for its room and for its commit. Default 5,000; a connected `Client` gives a request up
	 * after that in any case, so that more helps its `connect`, and a `Server` in this process.
	 */
	readonly timeoutMs?: number | undefined;
}

/** The names of {@link WaitOptions}. */
export const WAIT_OPTIONS = {
	signal: true,
	timeoutMs: true,
} satisfies Record<keyof WaitOptions, true>;

const TIMEOUT_MS = 5_000;

/** The timeout to use, checked. */
export function timeoutOf(options: WaitOptions): number {
	const { timeoutMs = TIMEOUT_MS } = options;
	checkInteger("timeoutMs", timeoutMs, 1, 2 ** 31 - 1);
	return timeoutMs;
}

/** The same, of a call that takes nothing else. */
export function timeoutOfCall(of: string, options: WaitOptions): number {
	checkOptions(of, options, WAIT_OPTIONS);
	return timeoutOf(options);
}

/**
 * Awaits native work. When the signal aborts first, the promise rejects at once, and `undo` gives back
 * what the work gets when it ends.
 */
export async function waitFor<T>(
	work: () => Promise<T>,
	signal: AbortSignal | undefined,
	undo: (value: T) => unknown = () => {},
): Promise<T> {
	throwIfAborted(signal);
	let running: Promise<T>;
	try {
		running = work();
		if (signal === undefined) {
			return await running;
		}
	} catch (error) {
		throw fromNative(error);
	}
	return await new Promise<T>((resolve, reject) => {
		let open = true;
		const abort = () => {
			open = false;
			reject(aborted(signal));
		};
		signal.addEventListener("abort", abort, { once: true });
		running.then(
			async (value) => {
				signal.removeEventListener("abort", abort);
				if (open) {
					resolve(value);
					return;
				}
				try {
					await undo(value);
				} catch {
					// Its deadline at the server ends it at last.
				}
			},
			(error: unknown) => {
				signal.removeEventListener("abort", abort);
				reject(fromNative(error));
			},
		);
	});
}

/** Throws `ABORTED` if the signal has aborted, and `INVALID_ARGUMENT` if it is none. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
	if (signal === undefined) {
		return;
	}
	if (typeof signal?.addEventListener !== "function") {
		throw invalid("signal must be an AbortSignal: pass the controller's `signal`");
	}
	if (signal.aborted) {
		throw aborted(signal);
	}
}

function aborted(signal: AbortSignal): KvferryError {
	return new KvferryError("ABORTED", "The call was aborted by its signal.", {
		cause: signal.reason,
	});
}
