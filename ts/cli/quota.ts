import { checkObject } from "../arguments.js";
import { type ErrorCode, ErrorCodes, KvferryError } from "../errors.js";
import { tokenOf } from "../token.js";
import { type QuotaOptions, quotaOptions } from "./options.js";

/** What a tenant has. */
interface Held {
	readonly used_bytes: number;
	readonly objects: number;
	readonly evicted_bytes: number;
}

/** What a tenant may have, in bytes. */
interface Quota {
	readonly cap: number | null;
	readonly guarantee: number;
}

/** The server's answer. */
interface Quotas {
	readonly memory_bytes: number;
	readonly persistent: boolean;
	readonly default: Quota;
	readonly tenants: Record<string, Quota & Held>;
	readonly unnamed: Held & { readonly tenants: number };
}

/** `kvferry quota`: lists, sets and unsets what tenants may have of the memory. */
export async function quota(args: string[]): Promise<void> {
	const options = quotaOptions(args);
	const quotas = await ask(options);
	if (options.json) {
		process.stdout.write(`${JSON.stringify(quotas)}\n`);
		return;
	}
	process.stdout.write(table(quotas));
	if (options.action !== "list" && !quotas.persistent) {
		process.stdout.write("this ends with the server: it was started without --quotas FILE\n");
	}
}

/** Asks the server; it answers each request with what holds then. */
async function ask(options: QuotaOptions): Promise<Quotas> {
	const { action, salt, cap, guarantee, http, timeoutMs } = options;
	const path =
		action === "list" ? "/quotas" : `/quotas/${salt === undefined ? "default" : "tenant"}`;
	const token = tokenOf(options, ["admin"]);
	const change = {
		method: action === "set" ? "PUT" : "DELETE",
		body: JSON.stringify({ salt, cap, guarantee }),
	};
	let answer: Response;
	let text: string;
	try {
		answer = await fetch(new URL(path, http), {
			...(action === "list" ? {} : change),
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
		if (typeof value?.memory_bytes !== "number") {
			throw foreign;
		}
		return value as unknown as Quotas;
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

function table(quotas: Quotas): string {
	const { memory_bytes: memory, unnamed } = quotas;
	const line = (name: string, quota: Quota, held?: Held) => [
		name,
		quota.cap === null ? "none" : size(quota.cap),
		size(quota.guarantee),
		held === undefined ? "" : size(held.used_bytes),
		held === undefined ? "" : String(held.objects),
		held === undefined ? "" : size(held.evicted_bytes),
	];
	const rows = [
		["tenant", "cap", "guarantee", "used", "objects", "evicted"],
		...Object.entries(quotas.tenants).map(([salt, one]) => line(JSON.stringify(salt), one, one)),
		line(`each of ${unnamed.tenants} others`, quotas.default, unnamed),
	];
	const widths = [0, 1, 2, 3, 4, 5].map((at) =>
		Math.max(...rows.map((row) => row[at]?.length ?? 0)),
	);
	const lines = rows.map((row) =>
		row
			.map((cell, at) => (at === 0 ? cell.padEnd(widths[at] ?? 0) : cell.padStart(widths[at] ?? 0)))
			.join("  "),
	);
	const guaranteed = Object.values(quotas.tenants).reduce((sum, one) => sum + one.guarantee, 0);
	return `${lines.join("\n")}\n${size(guaranteed)} of ${size(memory)} are guaranteed\n`;
}

/** Bytes as people read them: exact where the unit divides them. */
function size(bytes: number): string {
	const units = ["B", "KiB", "MiB", "GiB", "TiB"];
	const unit = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(bytes, 1)) / 10));
	const value = bytes / 2 ** (10 * unit);
	return `${Number.isInteger(value) ? value : value.toFixed(1)} ${units[unit]}`;
}
