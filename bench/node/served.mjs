// Servers, ours and LMCache's, each in a process of its own, and programs that put load on them in turns.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { installed } from "../../scripts/peers.mjs";
import { LmcacheServer } from "../../test/peers/programs.mjs";
import { load, median } from "./rows.mjs";

/** @typedef {{ p50: number, p99: number, max: number }} Spread of one request of a cycle, in microseconds */
/** @typedef {{ perSecond: number, lookup: Spread, prepare: Spread, commit: Spread, query: Spread, free: Spread, end: Spread }} Told */
/** @typedef {import("./rows.mjs").Row} Row */

export const ROUNDS = 5;
/** Milliseconds of one round of hit cycles. */
const MS = 1500;
/** Prompts of a side-by-side load. */
const PROMPTS = 16;
/**
 * For so many microseconds a client that is alone waits for an answer awake, in loads of that name: one that sleeps must
 * be woken for each answer, on an idle virtual processor most of the time of a cycle.
 */
export const AWAKE_US = 150;
/** @typedef {{ clients: number, awakeUs: number }} Load */
/** @type {Load[]} */
const LOADS = [
	{ clients: 1, awakeUs: 0 },
	{ clients: 1, awakeUs: AWAKE_US },
	{ clients: 8, awakeUs: 0 },
];

export function nameOf(/** @type {Load} */ { clients, awakeUs }) {
	return `${count(clients, "client")}${awakeUs > 0 ? ", awake" : ""}`;
}

/** A program that answers each line with one of JSON. */
export class Asked {
	/** @type {import("node:child_process").ChildProcess} */
	#child;
	/** @type {AsyncIterator<string>} */
	#lines;

	constructor(
		/** @type {string} */ program,
		/** @type {string[]} */ args,
		/** @type {NodeJS.ProcessEnv} */ env = process.env,
	) {
		const child = spawn(program, args, { stdio: ["pipe", "pipe", "inherit"], env });
		this.#child = child;
		this.#lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
	}

	/** The next answer, to a line or unasked. */
	async answer(/** @type {string | undefined} */ line = undefined) {
		if (line !== undefined) {
			this.#child.stdin?.write(`${line}\n`);
		}
		for (;;) {
			const { value, done } = await this.#lines.next();
			if (done) {
				throw new Error(`${this.#child.spawnargs.join(" ")} ended, asked ${line}`);
			}
			if (/^[[{]/.test(value)) {
				return JSON.parse(value); // Python's libraries log to stdout, too
			}
		}
	}

	async close() {
		this.#child.stdin?.end();
		if (this.#child.exitCode === null) {
			await once(this.#child, "exit");
		}
	}
}

/** A server's process. */
export class Served {
	/** `kvferry serve`, and the milliseconds to its first answer. */
	static async ours(/** @type {string[]} */ ...args) {
		const { Client } = await load();
		const program = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));
		const start = performance.now();
		const child = spawn(process.execPath, [program, "serve", "--port", "0", ...args], {
			stdio: ["ignore", "pipe", "inherit"],
		});
		const [line] = await once(createInterface({ input: child.stdout }), "line");
		const address = /** @type {string} */ (/tcp:\/\/(\S+)/.exec(line)?.[1]);
		const client = await Client.connect({ url: `tcp://${address}` }); // asks for its chunk size
		const ms = performance.now() - start;
		await client.close();
		return new Served(child, address, ms);
	}

	/** LMCache's, with shared memory of so many GB, without HTTP; or why there is none. */
	static async lmcache(gigabytes = 1) {
		const found = installed("lmcache");
		if (typeof found === "string") {
			return found;
		}
		const { Client } = await load();
		const memory = LmcacheServer.shared(`kvferry_bench_${process.pid}_${Served.#count++}`);
		const start = performance.now();
		const sizes = ["--chunk-size", "256", "--l1-size-gb", `${gigabytes}`];
		const metrics = true; // ours has them, too
		const server = await LmcacheServer.start([...sizes, ...memory], undefined, metrics);
		const client = await Client.connect({ url: server.url, timeoutMs: 60_000 });
		const ms = performance.now() - start;
		await client.close();
		return new Served(server.process, `127.0.0.1:${server.port}`, ms);
	}

	static #count = 0;
	#kill;

	/**
	 * @param {import("node:child_process").ChildProcess} child
	 * @param {string} address
	 * @param {number} startMs
	 */
	constructor(child, address, startMs) {
		this.child = child;
		this.address = address;
		this.startMs = startMs;
		this.#kill = () => child.kill();
		process.once("exit", this.#kill); // whatever ends us
	}

	get url() {
		return `tcp://${this.address}`;
	}

	/** Mebibytes of it that are in memory, without the pool's pages: these are shared. */
	get residentMib() {
		const status = readFileSync(`/proc/${this.child.pid}/status`, "utf8");
		const of = (/** @type {string} */ what) =>
			Number(new RegExp(`${what}:\\s+(\\d+) kB`).exec(status)?.[1]) / 1024;
		return of("VmRSS") - of("RssShmem");
	}

	async close() {
		process.off("exit", this.#kill);
		this.child.kill();
		await once(this.child, "exit");
	}
}

/**
 * Hit cycles of stored prompts of each length, by one client, awake or not, and by eight, on each server in turns.
 *
 * @param {string} program The load's: bench/examples/server.rs.
 * @param {Served[]} servers
 * @param {number[]} lengths
 */
export async function hitCycles(program, servers, lengths) {
	const loads = servers.map(({ address }) => new Asked(program, ["load", address]));
	await Promise.all(loads.map((asked) => asked.answer()));
	/** @type {({ tokens: number, told: Told[][] } & Load)[]} */
	const cycles = [];
	for (const tokens of lengths) {
		for (const asked of loads) {
			await asked.answer(`fill ${tokens} ${PROMPTS}`);
		}
		for (const { clients, awakeUs } of LOADS) {
			const line = `hit ${clients} ${tokens} ${PROMPTS} ${MS} ${awakeUs}`;
			const told = await inTurns(loads, (asked) => asked.answer(line));
			cycles.push({ tokens, clients, awakeUs, told });
		}
	}
	for (const asked of loads) {
		await asked.close();
	}
	return cycles;
}

/**
 * Asks all of them in turns, in the other order every second time.
 *
 * @template One, Answer
 * @param {One[]} all
 * @param {(one: One) => Promise<Answer>} ask
 */
export async function inTurns(all, ask, rounds = ROUNDS) {
	/** @type {Answer[][]} */
	const told = all.map(() => []);
	for (let round = 0; round < rounds; round++) {
		const turns = [...all.entries()];
		for (const [at, one] of round % 2 === 0 ? turns : turns.reverse()) {
			told[at]?.push(await ask(one));
		}
	}
	return told;
}

/**
 * Medians of both, and of the ratios of the pairs.
 *
 * @param {string} name
 * @param {string} unit
 * @param {number[]} ours
 * @param {number[]} references
 * @returns {Row}
 */
export function paired(name, unit, ours, references) {
	const ratio = median(ours.map((value, at) => value / /** @type {number} */ (references[at])));
	return { name, ours: median(ours), reference: median(references), unit, ratio };
}

export function count(/** @type {number} */ number, /** @type {string} */ what) {
	return `${number} ${what}${number === 1 ? "" : "s"}`;
}
