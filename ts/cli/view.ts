import type { Status } from "../server.js";
import { size } from "./units.js";

/** A look at a server. */
export interface Sample {
	/** Seconds by some clock. */
	readonly at: number;
	readonly status: Status;
}

const LABEL = 12;
const DROPS: readonly (readonly [string, string])[] = [
	["refused_chunks", "chunks, no room"],
	["refused_growing_chunks", "chunks, no room yet, the memory grows"],
	["abandoned_chunks", "chunks, their writer gave up"],
	["damaged_chunks", "chunks, damaged"],
	["disk_dropped_full", "saves, too many waited"],
	["disk_dropped_failed", "saves, the disk had failed"],
	["disk_save_failures", "saves, failed"],
	["disk_load_failures", "loads, failed"],
	["disk_damaged", "loads, damaged"],
	["failed_retrievals", "retrievals, gone or not leased"],
	["dropped_messages", "messages"],
];

/** The lines of a screen, none longer than it is wide, as many as it has rows at most. */
export function drawStatus(
	url: string,
	samples: readonly Sample[],
	trouble: string,
	{ columns, rows }: { readonly columns: number; readonly rows: number },
): string[] {
	const lines = [
		...header(url, samples, trouble),
		"",
		...body(samples),
		"",
		"Ctrl-C ends this view",
	];
	return lines
		.slice(0, Math.max(1, rows))
		.map((line) => [...line.replace(/\p{Cc}/gu, "\u{fffd}")].slice(0, columns).join(""));
}

function header(url: string, samples: readonly Sample[], trouble: string): string[] {
	const status = samples.at(-1)?.status;
	const about =
		status === undefined
			? `kvferry at ${url}`
			: `kvferry ${status.version} at ${url}, process ${status.pid}, up ${duration(Number(status.uptime_seconds))}`;
	return trouble === "" ? [about] : [about, `NO ANSWER: ${trouble}`];
}

function body(samples: readonly Sample[]): string[] {
	const now = samples.at(-1);
	const first = samples[0];
	if (now === undefined || first === undefined) {
		return [];
	}
	const before = samples.at(-2) ?? now;
	const value = (name: string, of: Sample = now) => Number(of.status[name] ?? 0);
	const since = (name: string, from: Sample) => Math.max(0, value(name) - value(name, from));
	const rate = (name: string) => since(name, before) / Math.max(now.at - before.at, 0.1);
	const row = (label: string, text: string) => `${label.padEnd(LABEL)}${text}`;
	const tokens = (name: string) => count(value(name) * value("chunk_size"));
	const lines = [
		row(
			"hit ratio",
			`${percent(since("hit_chunks", first), since("lookup_chunks", first))} of the last minute, ` +
				`${percent(value("hit_chunks"), value("lookup_chunks"))} since the start ` +
				`(${tokens("hit_chunks")} of ${tokens("lookup_chunks")} tokens)`,
		),
		row("memory", usage(value("used_bytes"), value("pool_bytes"), value("objects"))),
	];
	if (now.status.disk_bytes !== undefined) {
		lines.push(
			row("disk", usage(value("disk_used_bytes"), value("disk_bytes"), value("disk_objects"))),
		);
		const failure = now.status.disk_failure;
		lines.push(
			row(
				"",
				failure
					? `FAILED: ${failure}`
					: `${size(rate("disk_written_bytes"))}/s in, ${size(rate("disk_read_bytes"))}/s out, ` +
							`${size(value("disk_queue_bytes"))} and ${count(value("disk_queue_loads"))} loads wait`,
			),
		);
	}
	lines.push(
		row("stored", `${rate("stored_chunks").toFixed(1)} chunks/s, ${size(rate("stored_bytes"))}/s`),
		row(
			"loaded",
			`${rate("retrieved_chunks").toFixed(1)} chunks/s, ${size(rate("retrieved_bytes"))}/s`,
		),
		row(
			"held",
			`${count(value("leases"))} leases, ${count(value("slots_writing"))} slots being written, ` +
				`${count(value("slots_reading"))} being read, ${count(value("slots_apart"))} apart`,
		),
		row("engines", `${count(value("instances"))} workers, ${count(value("sessions"))} requests`),
		row(
			"evicted",
			`${count(value("evicted_objects"))} objects, ${size(value("evicted_bytes"))}; ` +
				`${count(since("evicted_objects", first))} in the last minute`,
		),
	);
	const drops = DROPS.filter(([name]) => value(name) > 0);
	for (const [at, [name, what]] of drops.entries()) {
		const recent = since(name, first);
		lines.push(
			row(
				at === 0 ? "dropped" : "",
				`${count(value(name))} ${what}; ${count(recent)} in the last minute`,
			),
		);
	}
	return lines;
}

function usage(used: number, of: number, objects: number): string {
	const WIDTH = 20;
	const full = of > 0 ? Math.min(WIDTH, Math.round((WIDTH * used) / of)) : 0;
	const bar = `[${"#".repeat(full)}${".".repeat(WIDTH - full)}]`;
	return `${bar} ${size(used)} of ${size(of)}, ${count(objects)} objects`;
}

function count(value: number): string {
	return value.toLocaleString("en");
}

function percent(part: number, whole: number): string {
	return whole > 0 ? `${((100 * part) / whole).toFixed(1)} %` : "–";
}

function duration(seconds: number): string {
	const units = [
		[86_400, "d"],
		[3600, "h"],
		[60, "min"],
	] as const;
	const [unit, name] = units.find(([unit]) => seconds >= 2 * unit) ?? [1, "s"];
	return `${Math.floor(seconds / unit)} ${name}`;
}
