import { setTimeout } from "node:timers/promises";
import { failureOf } from "../cache.js";
import { Client, type PromptQuestion } from "../client.js";
import { KvferryError } from "../errors.js";
import type { Explanation } from "../native-binding.js";
import type { Status } from "../server.js";
import { tokenOf } from "../token.js";
import { called, explainMiss } from "./miss.js";
import { type DoctorOptions, doctorOptions } from "./options.js";
import { readTokens } from "./tokens.js";
import { size } from "./units.js";

/** Between two looks at a server. */
const AGAIN_MS = 1000;

/** What one step of the examination came to. */
export interface Check {
	readonly check:
		| "server"
		| "bytes"
		| "chunk size"
		| "hashing"
		| "memory"
		| "disk"
		| "remote"
		| "prompt";
	/** `finding`: a reason for misses. `note`: worth knowing, or cannot be known. */
	readonly result: "ok" | "note" | "finding";
	readonly message: string;
}

interface Examination {
	readonly checks: Check[];
	/** What a kvferry server says of the prompt. */
	readonly explanation?: Explanation;
}

/** `kvferry doctor`: tells why a prompt misses. */
export async function doctor(args: string[]): Promise<void> {
	const options = doctorOptions(args);
	const tokens = options.prompt && (await readTokens(options.prompt.file));
	const { checks, explanation } = await examine(options, tokens);
	const healthy = checks.every(({ result }) => result !== "finding");
	if (options.json) {
		const told = { url: options.url, healthy, checks, explanation };
		process.stdout.write(`${JSON.stringify(told)}\n`);
	} else {
		for (const { check, result, message } of checks) {
			process.stdout.write(`${result.padEnd(7)}  ${check.padEnd(10)}  ${message}\n`);
		}
	}
	process.exitCode = healthy ? 0 : 1;
}

async function examine(options: DoctorOptions, tokens?: Uint32Array): Promise<Examination> {
	let client: Client;
	try {
		const { url, timeoutMs } = options;
		const token = tokenOf(options, ["admin", "data"]);
		client = await Client.connect({ url, timeoutMs, token });
	} catch (error) {
		const { message } = failureOf(error);
		return { checks: [{ check: "server", result: "finding", message }] };
	}
	try {
		const status = await statusOf(client, options);
		const later = await lookAgain(client, status, options);
		const checks = [
			checkServer(options.url, client, status),
			await checkBytes(client, options, status),
			checkChunkSize(client.chunkSize, options.chunkSize),
			checkHashing(status, options),
			...checkMemory(status),
			...checkDisk(status, later),
			...checkRemote(status, later),
		];
		if (options.prompt === undefined || tokens === undefined) {
			return { checks };
		}
		const question = { ...options.prompt, tokens };
		const { checks: more, ...told } = await examinePrompt(client, question, status, options);
		return { checks: [...checks, ...more], ...told };
	} finally {
		await client.close({ timeoutMs: options.timeoutMs });
	}
}

/** Undefined for a server that is not kvferry's. */
async function statusOf(client: Client, options: DoctorOptions): Promise<Status | undefined> {
	try {
		return await client.status({ timeoutMs: options.timeoutMs });
	} catch (error) {
		if (error instanceof KvferryError && error.code === "UNSUPPORTED_OPTION") {
			return undefined;
		}
		throw error;
	}
}

/** The status a moment later, where saves have failed: whether they still do. */
async function lookAgain(
	client: Client,
	status: Status | undefined,
	options: DoctorOptions,
): Promise<Status | undefined> {
	if (lost("disk", status) + lost("remote", status) === 0) {
		return status;
	}
	await setTimeout(AGAIN_MS);
	return await statusOf(client, options);
}

/** Saves that a tier failed or refused. */
function lost(tier: "disk" | "remote", status: Status | undefined): number {
	const figures = [status?.[`${tier}_save_failures`], status?.[`${tier}_dropped_failed`]];
	return figures.reduce((sum: number, figure) => sum + Number(figure ?? 0), 0);
}

function checkServer(url: string, client: Client, status: Status | undefined): Check {
	if (status === undefined) {
		return {
			check: "server",
			result: "note",
			message:
				`${url} is not kvferry's but LMCache's, or speaks as it does: as ${client.releases}. It does not ` +
				"tell why a prompt misses: only its chunk size and how much a lookup finds.",
		};
	}
	const { version, pid, uptime_seconds: seconds } = status;
	const message = `${url} is kvferry ${version}, process ${pid}, up ${Math.round(Number(seconds))} s.`;
	return { check: "server", result: "ok", message };
}

/** How the bytes would get there and back. */
async function checkBytes(
	client: Client,
	options: DoctorOptions,
	status: Status | undefined,
): Promise<Check> {
	const check = "bytes";
	const mode = status === undefined ? " (LMCache's engine_driven mode)" : "";
	try {
		const why = await client.findWay(options);
		return why === undefined
			? { check, result: "ok", message: `They go through shared memory${mode}.` }
			: {
					check,
					result: "note",
					message: `They go through the connection, which takes longer than shared memory: ${why}.`,
				};
	} catch (error) {
		return { check, result: "finding", message: failureOf(error).message };
	}
}

function checkChunkSize(size: number, expected = size): Check {
	const check = "chunk size";
	return size === expected
		? { check, result: "ok", message: `${size} tokens.` }
		: {
				check,
				result: "finding",
				message:
					`The server's chunks have ${size} tokens, not ${expected}: start it with ` +
					`--chunk-size ${expected}, or set up the engine for ${size}.`,
			};
}

function checkHashing(status: Status | undefined, options: DoctorOptions): Check {
	const check = "hashing";
	if (status === undefined) {
		const message =
			"LMCache's server does not tell its --hash-algorithm, nor the PYTHONHASHSEED of its process.";
		return { check, result: "note", message };
	}
	const { hashAlgorithm = "blake3", hashSeed = "0" } = options;
	const rule = "The server hashes token ids itself, by blake3 with seed 0";
	const others = [
		...(hashAlgorithm === "blake3" ? [] : [`algorithm ${hashAlgorithm}`]),
		...(hashSeed === "0" ? [] : [`seed ${hashSeed}`]),
	];
	return others.length === 0
		? { check, result: "ok", message: `${rule}.` }
		: {
				check,
				result: "finding",
				message:
					`${rule}: hashes made with ${others.join(" and ")} are never equal to its own. ` +
					"Compare nothing with them, and send token ids.",
			};
}

/** What there is to say of the memory. */
export function checkMemory(status: Status | undefined): Check[] {
	if (status === undefined) {
		return [];
	}
	const figure = (name: string) => Number(status[name] ?? 0);
	const mebibytes = (name: string) => `${(figure(name) / 2 ** 20).toFixed(1)} MiB`;
	const finding = (message: string): Check => ({ check: "memory", result: "finding", message });
	const findings: Check[] = [];
	if (figure("growth_failed") > 0) {
		findings.push(
			finding(
				`Shared memory ran out at ${mebibytes("reserved_bytes")} of a pool of ` +
					`${mebibytes("pool_bytes")}: enlarge /dev/shm (in a container: --shm-size), or start the ` +
					"server with less --memory.",
			),
		);
	}
	if (figure("slots_apart") > 0) {
		findings.push(
			finding(
				`${figure("slots_apart")} slots (${mebibytes("slots_apart_bytes")} of writers) are set ` +
					"apart: engines that the server gave up may still use them. Ending those engines gives " +
					"them back; where they are in another container or another user's, restart the server after it.",
			),
		);
	}
	const refused = figure("refused_chunks");
	const caps = refused > 0 ? " (a tenant's cap refuses, too: kvferry quota lists them)" : "";
	const early = figure("refused_growing_chunks");
	const growing =
		early > 0
			? `, and ${early} that came faster than the memory grows: ${mebibytes("reserved_bytes")} of it are reserved yet`
			: "";
	const message =
		`${mebibytes("used_bytes")} used of ${mebibytes("pool_bytes")}; evicted since the start: ` +
		`${figure("evicted_objects")}, refused for want of room: ${refused}${caps}${growing}.`;
	return findings.length > 0 ? findings : [{ check: "memory", result: "ok", message }];
}

/** Nothing of a server without one. */
export function checkDisk(status: Status | undefined, later = status): Check[] {
	if (status?.disk_bytes === undefined || later === undefined) {
		return [];
	}
	const { disk_bytes: room, disk_bound_bytes: bound = room } = status;
	const checks = checkTier("disk", status, later, `It works, with ${status.disk_objects} objects`, [
		["disk_damaged", "files were not what was written (misses)"],
		["disk_load_failures", "loads failed"],
		["disk_save_failures", "saves failed"],
		["disk_dropped_failed", "saves came while it had failed"],
		["disk_dropped_full", "saves were dropped because too many waited"],
	]);
	if (Number(room) < Number(bound)) {
		const message = `It may hold ${size(Number(room))} of ${size(Number(bound))}: the file system is full. Free some space, or give less --disk-size.`;
		checks.push({ check: "disk", result: "note", message });
	}
	return checks;
}

/** The same. */
export function checkRemote(status: Status | undefined, later = status): Check[] {
	if (status?.remote_failure === undefined || later === undefined) {
		return [];
	}
	const { remote_saves: saves, remote_loads: loads } = status;
	return checkTier("remote", status, later, `It works: ${saves} objects written, ${loads} loaded`, [
		["remote_damaged", "objects were not what was written (misses)"],
		["remote_outages", "times it did not answer or took nothing"],
		["remote_load_failures", "loads failed"],
		["remote_save_failures", "saves failed"],
		["remote_dropped_failed", "saves came while it had failed"],
		["remote_dropped_full", "saves were dropped because too many waited"],
	]);
}

function checkTier(
	check: "disk" | "remote",
	status: Status,
	later: Status,
	message: string,
	failures: readonly (readonly [name: string, what: string])[],
): Check[] {
	const failure = status[`${check}_failure`];
	if (failure) {
		const message = `The ${check} tier failed and takes nothing just now: ${failure}.`;
		return [{ check, result: "finding", message }];
	}
	const now = lost(check, later) - lost(check, status);
	const [failed, written] = [lost(check, later), Number(later[`${check}_saves`] ?? 0)];
	if (now > 0 || failed > written) {
		const message =
			`Saves fail: ${failed} since the start, ${now} of them in the last second, and ${written} objects were written. ` +
			(check === "disk"
				? "The log says why (tier_failed)."
				: "Is it full, and keeps what it has (Redis: maxmemory-policy noeviction)? docs/remote.md has what it needs.");
		return [{ check, result: "finding", message }];
	}
	const told = failures
		.map(([name, what]) => [Number(status[name] ?? 0), what] as const)
		.filter(([count]) => count > 0)
		.map(([count, what]) => `${count} ${what}`);
	return told.length === 0
		? [{ check, result: "ok", message: `${message}.` }]
		: [{ check, result: "note", message: `${message}; since the start: ${told.join(", ")}.` }];
}

async function examinePrompt(
	client: Client,
	question: PromptQuestion,
	status: Status | undefined,
	options: DoctorOptions,
): Promise<Examination> {
	const { length } = question.tokens;
	const { chunkSize } = client;
	const of = (result: Check["result"], message: string): Check => ({
		check: "prompt",
		result,
		message,
	});
	if (length < chunkSize) {
		const message =
			`It has ${length} tokens, fewer than one chunk of ${chunkSize}: only whole chunks are ` +
			"stored, so it can never hit.";
		return { checks: [of("finding", message)] };
	}
	const chunks = Math.floor(length / chunkSize);
	const rest = length % chunkSize;
	const after = rest === 0 ? "" : ` The last ${rest} tokens are no whole chunk and are computed.`;
	const whole = `All ${chunks} whole chunks are there.${after}`;
	if (status === undefined) {
		const hits = await client.countHits(question, options);
		const message =
			`A lookup finds ${hits} of ${chunks} whole chunks. Why not more, LMCache's server does not ` +
			"tell. It finds none at all while no engine is registered for the model.";
		return { checks: [hits === chunks ? of("ok", whole) : of("finding", message)] };
	}
	const explanation = await client.explain(question, options);
	const { missing, registered } = explanation;
	const checks: Check[] = [];
	if (!registered) {
		checks.push(
			of(
				"note",
				`No engine is registered now for model ${called(question.modelName)} with world size ` +
					`${question.kvWorldSize}: until one is, lookups find nothing.`,
			),
		);
	}
	if (missing === undefined) {
		checks.push(of("ok", whole));
	} else {
		const reasons = explainMiss(explanation, missing, question, chunkSize, status);
		checks.push(...reasons.map((reason) => of("finding", reason)));
	}
	return { checks, explanation };
}
