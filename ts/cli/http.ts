import { checkObject } from "../arguments.js";
import { type ErrorCode, ErrorCodes, KvferryError } from "../errors.js";
import { tokenOf } from "../token.js";

/** Where a server answers HTTP, and how long it may take. */
export interface HttpOptions {
	readonly http: URL;
	/** File with the admin's token; the environment's where absent. */
	readonly tokenFile?: string;
	readonly timeoutMs: number;
}

/**
 * What a server answers: an object with a member `expected`.
 *
 * @throws {@link KvferryError} `TIMEOUT`, `UNREACHABLE`, `PROTOCOL` for what is no kvferry server, or what it says.
 */
export async function askHttp(
	options: HttpOptions,
	path: string,
	change: { readonly method: string; readonly body: object } | undefined,
	expected: string,
): Promise<Record<string, unknown>> {
	const { http, timeoutMs } = options;
	const token = tokenOf(options, ["admin"]);
	let answer: Response;
	let text: string;
	try {
		answer = await fetch(new URL(path, http), {
			...(change === undefined ? {} : { method: change.method, body: JSON.stringify(change.body) }),
			headers: {
				"content-type": "application/json",
				...(token === undefined ? {} : { authorization: `Bearer ${token}` }),
			},
			redirect: "error",
			signal: AbortSignal.timeout(timeoutMs),
		});
		text = await answer.text();
	} catch (cause) {
		throw (cause as Error).name === "TimeoutError"
			? new KvferryError("TIMEOUT", `${http.origin} has not answered within ${timeoutMs} ms`, {
					cause,
				})
			: new KvferryError(
					"UNREACHABLE",
					`nobody answers HTTP at ${http.origin}: start kvferry serve, or say where with --http URL`,
					{ cause },
				);
	}
	const foreign = new KvferryError(
		"PROTOCOL",
		`${http.origin} answers ${answer.status}, and not as a kvferry server: give --http URL`,
	);
	const value = parse(text);
	if (answer.ok) {
		if (value === undefined || !Object.hasOwn(value, expected)) {
			throw foreign;
		}
		return value;
	}
	const { code, message } = (value?.error ?? {}) as Record<string, unknown>;
	if (typeof code !== "string" || typeof message !== "string") {
		throw foreign;
	}
	// HTTP's own codes are none of ours.
	throw new KvferryError(
		Object.hasOwn(ErrorCodes, code) ? (code as ErrorCode) : "INVALID_ARGUMENT",
		message,
	);
}

function parse(text: string): Record<string, unknown> | undefined {
	try {
		const value: unknown = JSON.parse(text);
		checkObject("the answer", value);
		return value as Record<string, unknown>;
	} catch {
		return undefined;
	}
}
