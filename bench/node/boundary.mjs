// What crossing into the addon adds to hashing 32k tokens: a call from JavaScript against the same
// function of Rust in a process that never crosses (bench/boundary.rs). Both write into memory that
// they reuse, and they take turns within one run.

import { spawn } from "node:child_process";
import { randomFillSync } from "node:crypto";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { buildProgram, load, median } from "./rows.mjs";

const kvferry = await load();

const PAIRS = 101;
const HALF_MS = 4; // short, so that what else the machine does falls on both
const TOKENS = 32 * 1024;

/** @type {[string, () => import("../../ts/index.js").BlockHasher | import("../../ts/index.js").ChunkHasher][]} */
const HASHERS = [
	["blake3", () => new kvferry.ChunkHasher()],
	["sha256", () => new kvferry.BlockHasher({ seed: "0" })],
	["sha256_cbor", () => new kvferry.BlockHasher({ seed: "0", algorithm: "sha256_cbor" })],
	["xxhash_cbor", () => new kvferry.BlockHasher({ seed: "0", algorithm: "xxhash_cbor" })],
];

/**
 * Nanoseconds of one call.
 *
 * @returns {Promise<import("./rows.mjs").Row[]>}
 */
export default async function boundary() {
	const tokens = randomFillSync(new Uint32Array(TOKENS)).map((id) => id % 128_256);
	const program = buildProgram("kvferry-bench", "--bin", "boundary");
	const rows = [];
	for (const [algorithm, make] of HASHERS) {
		const hasher = make();
		const into = new Uint8Array(TOKENS * 32);
		rows.push(await compare(program, algorithm, tokens, () => hasher.append(tokens, into)));
	}
	return rows;
}

async function compare(
	/** @type {string} */ program,
	/** @type {string} */ algorithm,
	/** @type {Uint32Array} */ tokens,
	/** @type {() => import("../../ts/index.js").Hashes} */ call,
) {
	const child = spawn(program, [algorithm], { stdio: ["pipe", "pipe", "inherit"] });
	const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
	child.stdin.write(`${tokens.length}\n`);
	child.stdin.write(new Uint8Array(tokens.buffer));
	const reference = async (/** @type {number} */ calls) => {
		child.stdin.write(`${calls}\n`);
		const [, ns, hashes] = /^(\d+) (.*)$/.exec((await lines.next()).value) ?? [];
		return { ns: Number(ns) / calls, hashes };
	};
	const ours = (/** @type {number} */ calls) => {
		const start = process.hrtime.bigint();
		for (let i = 0; i < calls; i++) {
			call();
		}
		return Number(process.hrtime.bigint() - start) / calls;
	};

	const { hashes } = await reference(1);
	if (hashes !== JSON.stringify([...call().bytes.subarray(0, 16)]).replaceAll(",", ", ")) {
		throw new Error(`${algorithm}: the results differ, so times mean nothing`);
	}
	ours(100); // compiled by then
	const calls = Math.ceil((HALF_MS * 1e6) / (await reference(100)).ns);
	/** @type {[number, number][]} */
	const pairs = [];
	for (let pair = 0; pair < PAIRS; pair++) {
		if (pair % 2 === 0) {
			pairs.push([ours(calls), (await reference(calls)).ns]);
		} else {
			const { ns } = await reference(calls);
			pairs.push([ours(calls), ns]);
		}
	}
	child.stdin.end();
	await once(child, "close");
	return {
		name: `32k tokens, ${algorithm}, from JavaScript ÷ in Rust`,
		ours: median(pairs.map(([ns]) => ns)),
		reference: median(pairs.map(([, ns]) => ns)),
		unit: "ns",
		ratio: median(pairs.map(([ns, reference]) => ns / reference)),
	};
}
