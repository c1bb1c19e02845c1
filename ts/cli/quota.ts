import { askHttp } from "./http.js";
import { type QuotaOptions, quotaOptions } from "./options.js";
import { columns, size } from "./units.js";

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
export interface Quotas {
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
	const { action, salt, cap, guarantee } = options;
	const path =
		action === "list" ? "/quotas" : `/quotas/${salt === undefined ? "default" : "tenant"}`;
	const change = { method: action === "set" ? "PUT" : "DELETE", body: { salt, cap, guarantee } };
	const quotas = await askHttp(
		options,
		path,
		action === "list" ? undefined : change,
		"memory_bytes",
	);
	return quotas as unknown as Quotas;
}

/** What `kvferry quota` prints. */
export function table(quotas: Quotas): string {
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
		line(
			unnamed.tenants === 1 ? "the 1 other" : `each of ${unnamed.tenants} others`,
			quotas.default,
			unnamed,
		),
	];
	const guaranteed = Object.values(quotas.tenants).reduce((sum, one) => sum + one.guarantee, 0);
	return `${columns(rows)}${size(guaranteed)} of ${size(memory)} are guaranteed\n`;
}
