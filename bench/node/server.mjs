// Ours beside LMCache's server under the same load of a native program (bench/examples/server.rs), in turns; servers
// of 1,000,000 and of 1,000 objects, in turns; and what a server takes: memory, time to start.
//
// With KVFERRY_BENCH_LOOKUP=FILE, prototypes/lmcache/bench_lookup.py prints its own figures of both, on stderr.

import { spawnSync } from "node:child_process";
import { setTimeout as sleep } from "node:timers/promises";
import { installLmcache } from "../../scripts/peers.mjs";
import { buildProgram, median } from "./rows.mjs";
import { Asked, AWAKE_US, hitCycles, inTurns, nameOf, paired, ROUNDS, Served } from "./served.mjs";

/** @typedef {import("./served.mjs").Told} Told */
/** @typedef {import("./rows.mjs").Row} Row */

const SMALL = 1000;
const LARGE = 1_000_000;
/** Rounds of servers of two sizes: many short ones, since other tenants of the machine disturb the slowest cycles. */
const SIZE_ROUNDS = 15;
const SIZE_MS = 600;
/** New prompts of one round of stores; each takes the place of eight objects. */
const STORES = 2000;
/** Hit cycles a second of LMCache 0.5.6, the most that were recorded on another machine with two cores. */
const RECORDED = new Map([
	[1, 241],
	[8, 269],
]);

/** @returns {Promise<Row[]>} */
export default async function server() {
	const program = buildProgram("kvferry-bench", "--example", "server");
	return [...(await sideBySide(program)), ...(await bySize(program)), ...(await atRest())];
}

/** Hit cycles of both servers. */
async function sideBySide(/** @type {string} */ program) {
	const ours = await Served.ours("--memory", "64MiB");
	const theirs = await Served.lmcache();
	if (typeof theirs === "string") {
		console.error(`SKIPPED LMCache's server beside ours: ${theirs}`);
	}
	const servers = typeof theirs === "string" ? [ours] : [ours, theirs];
	/** @type {Row[]} */
	const rows = [];
	for (const { tokens, told, ...load } of await hitCycles(program, servers, [2048, 8192])) {
		rows.push(...besides(told, tokens, load));
	}
	const file = process.env.KVFERRY_BENCH_LOOKUP;
	for (const { address } of file === undefined ? [] : servers) {
		for (const [tokens, clients, cycles] of [
			[2048, 1, 400],
			[2048, 8, 800],
			[8192, 1, 200],
		]) {
			const args = [`${file}`, `tcp://${address}`, `${tokens}`, `${clients}`, `${cycles}`];
			const { stdout, stderr } = spawnSync(installLmcache(), args, {
				encoding: "utf8",
				timeout: 120_000,
			});
			console.error(
				`bench_lookup.py ${address === ours.address ? "ours" : "LMCache"}: ${stdout || stderr}`,
			);
		}
	}
	if (typeof theirs !== "string") {
		const { startMs, residentMib } = theirs;
		console.error(
			`LMCache's server: ${startMs.toFixed(0)} ms to its first answer, ${residentMib.toFixed(0)} MiB`,
		);
	}
	for (const served of servers) {
		await served.close();
	}
	return rows;
}

/**
 * @param {Told[][]} told Of each server.
 * @param {number} tokens
 * @param {import("./served.mjs").Load} load
 */
function besides([ours = [], theirs], tokens, load) {
	const name = `${tokens} tokens, ${nameOf(load)}`;
	const { clients, awakeUs } = load;
	/** @type {Row[]} */
	const rows = [];
	const row = (
		/** @type {string} */ what,
		/** @type {string} */ unit,
		/** @type {(told: Told) => number} */ of,
	) => {
		if (theirs !== undefined) {
			rows.push(paired(`${name}: ${what}, beside LMCache's`, unit, ours.map(of), theirs.map(of)));
		}
	};
	row("hit cycles a second", "1/s", (told) => told.perSecond);
	row("lookup p50", "µs", (told) => told.lookup.p50);
	row("lookup p99", "µs", (told) => told.lookup.p99);
	const recorded = awakeUs === 0 ? RECORDED.get(clients) : undefined;
	if (theirs === undefined && tokens === 2048 && recorded !== undefined) {
		const cycles = median(ours.map((told) => told.perSecond));
		const what = "hit cycles a second; LMCache's as recorded, not of this run";
		rows.push(limit(`${name}: ${what}`, "1/s", cycles, recorded));
	}
	if (clients === 1) {
		const most = tokens === 2048 ? 150 : 350;
		const of = (/** @type {"p50" | "p99"} */ part) =>
			median(ours.map(({ lookup }) => lookup[part]));
		rows.push(limit(`${name}: lookup p50; limit ${most} µs`, "µs", of("p50"), most));
		rows.push(limit(`${name}: lookup p99; limit 1 ms`, "µs", of("p99"), 1000));
	}
	return rows;
}

/** Servers of many objects and of few, both full. */
async function bySize(/** @type {string} */ program) {
	const sizes = await Promise.all(
		[LARGE, SMALL].map(async (objects) => {
			const served = new Asked(program, ["serve", `${objects}`]);
			const { address, objects: stored, prompts, longestMs } = await served.answer();
			if (stored !== objects) {
				throw new Error(`${stored} of ${objects} objects are stored`);
			}
			const asked = new Asked(program, ["load", address]);
			await asked.answer();
			return { served, asked, objects, prompts, longestMs };
		}),
	);
	/** @type {Row[]} */
	const rows = [];
	const of = `${LARGE.toLocaleString("en")} objects ÷ ${SMALL.toLocaleString("en")}, limit 1.2`;
	const row = (
		/** @type {string} */ what,
		/** @type {Told[][]} */ told,
		/** @type {(told: Told) => number} */ part,
	) => {
		const [large = [], small = []] = told.map((told) => told.map(part));
		rows.push(paired(`${what}; ${of}`, "µs", large, small));
	};
	const [large] = sizes;
	const { bytes } = await /** @type {NonNullable<typeof large>} */ (large).served.answer("");
	const taken = bytes / LARGE;
	rows.push(limit("memory beside the pool, an object of 1,000,000; limit 200", "B", taken, 200));
	for (const load of [
		{ clients: 1, awakeUs: AWAKE_US },
		{ clients: 8, awakeUs: 0 },
	]) {
		const { clients, awakeUs } = load;
		const told = await inTurns(
			sizes,
			({ asked, prompts }) => asked.answer(`hit ${clients} 2048 ${prompts} ${SIZE_MS} ${awakeUs}`),
			SIZE_ROUNDS,
		);
		const with_ = `2048 tokens, ${nameOf(load)}`;
		row(`hit cycle, ${with_}`, told, ({ perSecond }) => (1e6 * clients) / perSecond);
		row(`lookup p50, ${with_}`, told, ({ lookup }) => lookup.p50);
		row(`lookup p99, ${with_}`, told, ({ lookup }) => lookup.p99);
	}
	let round = 0;
	const stored = await inTurns(
		sizes,
		({ asked, prompts }) => {
			const first = prompts + Math.floor(round++ / sizes.length) * STORES;
			return asked.answer(`store 2048 ${first} ${STORES} ${AWAKE_US}`);
		},
		SIZE_ROUNDS,
	);
	row(
		"store cycle of 8 new chunks, 8 others evicted, 1 client, awake",
		stored,
		({ perSecond }) => 1e6 / perSecond,
	);
	row("prepare p50", stored, ({ prepare }) => prepare.p50);
	row("prepare p99", stored, ({ prepare }) => prepare.p99);
	const { bytes: after } = await /** @type {NonNullable<typeof large>} */ (large).served.answer("");
	for (const { served, asked, objects, longestMs } of sizes) {
		console.error(
			`${objects} objects: the longest store while filling took ${longestMs.toFixed(1)} ms`,
		);
		await asked.close();
		await served.close();
	}
	console.error(
		`after ${SIZE_ROUNDS * STORES * 8} evictions: ${(after / LARGE).toFixed(0)} B an object`,
	);
	return rows;
}

/** A server that nobody has asked for anything yet. */
async function atRest() {
	const starts = [];
	const resident = [];
	for (let round = 0; round < ROUNDS; round++) {
		const served = await Served.ours();
		await sleep(500);
		starts.push(served.startMs);
		resident.push(served.residentMib);
		await served.close();
	}
	return [
		limit("kvferry serve at rest, without its pool; limit 64 MiB", "MiB", median(resident), 64),
		limit("from its start to its first answer; limit 0.5 s", "ms", median(starts), 500),
	];
}

/**
 * @param {string} name
 * @param {string} unit
 * @param {number} ours
 * @param {number} reference
 * @returns {Row}
 */
function limit(name, unit, ours, reference) {
	return { name, ours, reference, unit, ratio: ours / reference };
}
