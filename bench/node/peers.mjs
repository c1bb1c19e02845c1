// Ours beside the real vLLM and LMCache, in turns within one run on one machine: `npm run bench -- peers [PART …]`.
// Whatever is timed is compared with what theirs gives first. What is not installed is told in a line that begins with
// SKIPPED; `npm run test:peers` installs both.

import { readFileSync } from "node:fs";
import { cpus, loadavg } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { isDeepStrictEqual } from "node:util";
import { installed, installLmcache, installVllm } from "../../scripts/peers.mjs";
import { VllmEngine } from "../../test/peers/programs.mjs";
import { OBJECT, plainCopies, Stack, WARM_UP } from "./copy.mjs";
import { ConnectorLoad, measure, planned, REQUESTS, STEPS, TableLoad } from "./plan.mjs";
import { buildProgram, load, median } from "./rows.mjs";
import { Asked, hitCycles, inTurns, nameOf, paired, Served } from "./served.mjs";

/** @typedef {import("./rows.mjs").Row} Row */

const kvferry = await load();
const manifest = readFileSync(new URL("../../package.json", import.meta.url), "utf8");
/** @type {{ version: string }} */
const { version } = JSON.parse(manifest);
const script = fileURLToPath(new URL("peers.py", import.meta.url));
/** vLLM's xxhash algorithms draw a seed in each process otherwise. */
const env = {
	...process.env,
	PYTHONHASHSEED: "0",
	LMCACHE_TRACK_USAGE: "false",
	LMCACHE_LOG_LEVEL: "WARNING",
	VLLM_LOGGING_LEVEL: "ERROR",
};

/** @type {Record<string, { needs: ("lmcache" | "vllm")[], run: () => Promise<Row[]> }>} */
const PARTS = {
	hashes: { needs: ["vllm"], run: hashes },
	chunks: { needs: ["lmcache"], run: chunks },
	plans: { needs: ["vllm"], run: plans },
	start: { needs: ["lmcache"], run: start },
	copies: { needs: ["lmcache"], run: copies },
	lookups: { needs: ["lmcache"], run: lookups },
	ttft: { needs: ["lmcache", "vllm"], run: ttft },
};

/** @returns {Promise<Row[]>} */
export default async function peers(/** @type {string[]} */ ...names) {
	const peers = { lmcache: installed("lmcache"), vllm: installed("vllm") };
	for (const [peer, found] of Object.entries(peers)) {
		console.error(
			typeof found === "string"
				? `SKIPPED what needs ${peer}: ${found}`
				: `${peer} ${found.version}, Python ${found.python}`,
		);
	}
	console.error(`kvferry ${version}, Node.js ${process.versions.node}`);
	console.error(`${cpus().length} cores, ${cpus()[0]?.model}; load average ${loads()}`);
	/** @type {Row[]} */
	const rows = [];
	for (const [name, { needs, run }] of Object.entries(PARTS)) {
		if (names.length > 0 && !names.includes(name)) {
			continue;
		}
		if (needs.some((peer) => typeof peers[peer] === "string")) {
			console.error(`SKIPPED ${name}: needs ${needs.join(" and ")}`);
			continue;
		}
		const begun = performance.now();
		const told = await run();
		rows.push(...told);
		for (const { name, ratio } of told) {
			console.error(`${name}: ${ratio.toFixed(3)}`); // should a later part fail
		}
		console.error(
			`${name}: ${((performance.now() - begun) / 1000).toFixed(0)} s, load average ${loads()}`,
		);
	}
	return rows;
}

function loads() {
	return loadavg()
		.map((load) => load.toFixed(1))
		.join(", ");
}

/** A part of peers.py, ready. */
async function python(/** @type {string} */ program, /** @type {string[]} */ ...args) {
	const asked = new Asked(program, [script, ...args], env);
	await asked.answer();
	return {
		ask: (/** @type {object} */ question) => asked.answer(JSON.stringify(question)),
		close: () => asked.close(),
	};
}

/** A row whose ratio tells how many times as fast as theirs ours is. */
function faster(
	/** @type {string} */ name,
	/** @type {string} */ unit,
	/** @type {number[]} */ ours,
	/** @type {number[]} */ theirs,
) {
	const row = paired(name, unit, ours, theirs);
	const ratio = median(theirs.map((their, at) => their / /** @type {number} */ (ours[at])));
	return { ...row, ratio };
}

const TOKENS = Uint32Array.from({ length: 32 * 1024 }, (_, at) => (at * 7919 + 13) % 128_256);
const HASH_ROUNDS = 51;

/**
 * Microseconds of hashing 32k tokens, through the package and in theirs.
 *
 * @param {Awaited<ReturnType<typeof python>>} peer
 * @param {string} algorithm
 * @param {string} name
 * @param {() => import("../../ts/index.js").Hashes} ours
 */
async function hashed(peer, algorithm, name, ours) {
	const { hashes, skipped } = await peer.ask({ algorithm, times: 1 });
	if (skipped !== undefined) {
		console.error(`SKIPPED ${algorithm}: ${skipped}`); // vLLM itself does without this module
		return [];
	}
	const told = [...ours()].map((hash) => Buffer.from(hash).toString("hex"));
	if (hashes.length === 0 || told.join() !== hashes.join()) {
		throw new Error(`${algorithm}: the hashes differ, so times mean nothing`);
	}
	const timed = (/** @type {number} */ calls) => {
		const begun = performance.now();
		for (let call = 0; call < calls; call++) {
			ours();
		}
		return ((performance.now() - begun) * 1000) / calls;
	};
	timed(200); // compiled by then
	const theirs = async () => (await peer.ask({ algorithm, times: 1 })).ns / 1000;
	// As long as one of theirs, so that what else the machine does falls on both.
	const calls = Math.max(1, Math.round((await theirs()) / timed(100)));
	const sides = [async () => timed(calls), theirs];
	const [us = [], their = []] = await inTurns(sides, (side) => side(), HASH_ROUNDS);
	return [faster(name, "µs", us, their)];
}

/** Block hashes beside vLLM's. */
async function hashes() {
	const vllm = await python(installVllm(), "hashes");
	const rows = [];
	for (const [algorithm, limit] of /** @type {const} */ ([
		["sha256_cbor", "; limit 40"],
		["xxhash_cbor", "; limit 90"],
		["sha256", ""],
	])) {
		const name = `block hashes of 32k tokens, ${algorithm}: vLLM's ÷ ours${limit}`;
		const options = { seed: "0", algorithm };
		rows.push(...(await hashed(vllm, algorithm, name, () => kvferry.blockHashes(TOKENS, options))));
	}
	await vllm.close();
	return rows;
}

/** Chunk hashes beside LMCache's. */
async function chunks() {
	const lmcache = await python(installLmcache(), "chunks");
	const name = "chunk hashes of 32k tokens, blake3: LMCache's ÷ ours";
	const rows = await hashed(lmcache, "blake3", name, () => kvferry.chunkHashes(TOKENS));
	await lmcache.close();
	return rows;
}

/** Microseconds of planning a scheduler's step, beside vLLM's built-in LMCacheMPConnector. */
async function plans() {
	const vllm = await python(installVllm(), "plans");
	const shapes = {
		idle: { count: REQUESTS },
		alone: { count: 0, prompt: true },
	};
	for (const shape of [...Object.values(shapes), { count: REQUESTS, chunks: true }]) {
		const theirs = await vllm.ask({ ...shape, steps: STEPS, turns: 0 });
		for (const Load of [TableLoad, ConnectorLoad]) {
			if (!isDeepStrictEqual(planned(Load, shape), theirs.planned)) {
				throw new Error(`${Load.name}: vLLM plans otherwise, so times mean nothing`);
			}
		}
	}
	/** @typedef {{ plan: number, metadata: number }} Step */
	/** @type {(() => Promise<{ idle: Step, alone: Step }>)[]} */
	const sides = [
		async () => {
			const plan = measure(TableLoad, shapes, 1);
			const metadata = measure(ConnectorLoad, shapes, 1);
			const of = (/** @type {"idle" | "alone"} */ shape) => ({
				plan: plan[shape],
				metadata: metadata[shape],
			});
			return { idle: of("idle"), alone: of("alone") };
		},
		async () => {
			const ask = (/** @type {object} */ shape) => vllm.ask({ ...shape, steps: STEPS, turns: 1 });
			return { idle: await ask(shapes.idle), alone: await ask(shapes.alone) };
		},
	];
	const [ours = [], theirs = []] = await inTurns(sides, (side) => side());
	await vllm.close();
	const row = (
		/** @type {string} */ name,
		/** @type {"idle" | "alone"} */ shape,
		/** @type {"plan" | "metadata"} */ what,
	) => {
		const requests = shape === "idle" ? REQUESTS : 1;
		const [us, them] = [ours, theirs].map((of) => of.map((step) => step[shape][what] / requests));
		return faster(name, "µs", us ?? [], them ?? []);
	};
	return [
		row("32k tokens stored: GetStoreMetadata ÷ our plan; limit 100", "alone", "plan"),
		row("one of 1,024 with nothing to do: the same; limit 6", "idle", "plan"),
		row("32k tokens stored: build_connector_meta ÷ ours", "alone", "metadata"),
		row("one of 1,024 with nothing to do: build_connector_meta ÷ ours", "idle", "metadata"),
	];
}

/** From a server's start to its first answer, and what it takes besides its pool of 1 GB. */
async function start() {
	/** @type {(() => Promise<Served | string>)[]} */
	const sides = [() => Served.ours("--memory", "1GiB", "--http-port", "0"), () => Served.lmcache()];
	const [ours = [], theirs = []] = await inTurns(
		sides,
		async (side) => {
			const served = started(await side());
			await sleep(500); // what it does after its first answer
			const told = { ms: served.startMs, mib: served.residentMib };
			await served.close();
			return told;
		},
		3,
	);
	const row = (/** @type {string} */ name, /** @type {"ms" | "mib"} */ what, unit = "ms") =>
		paired(
			name,
			unit,
			ours.map((told) => told[what]),
			theirs.map((told) => told[what]),
		);
	return [
		row("a server's start to its first answer ÷ LMCache's; limit 0.1", "ms"),
		row("its memory at rest, without the pool ÷ LMCache's; limit 0.1", "mib", "MiB"),
	];
}

/** Hit cycles of both servers under one load. */
async function lookups() {
	const program = buildProgram("kvferry-bench", "--example", "server");
	const servers = [
		await Served.ours("--memory", "64MiB", "--http-port", "0"),
		started(await Served.lmcache()),
	];
	const rows = [];
	for (const { tokens, told, ...load } of await hitCycles(program, servers, [2048])) {
		const [ours = [], theirs = []] = told.map((of) => of.map(({ perSecond }) => perSecond));
		const name = `${tokens} tokens, ${nameOf(load)}: hit cycles a second ÷ LMCache's`;
		rows.push(paired(`${name}; limit 10`, "1/s", ours, theirs));
	}
	for (const served of servers) {
		await served.close();
	}
	return rows;
}

/** Chunks of 32 MiB of a request. */
const CHUNKS = 2;
/** Requests of each client after which LMCache's pool is emptied: it does not make room when it is asked for it. */
const PERIOD = 8;

/** Milliseconds of stores and loads through shared memory, from submission to end. */
async function copies() {
	const server = started(await Served.lmcache(2));
	const plain = plainCopies(buildProgram("kvferry-copy", "--example", "copies"), CHUNKS);
	const ours = await Stack.open("never");
	const crossed = await Stack.open("never", { kv: ours.kv }, server.url);
	const theirs = await python(installLmcache(), "copies", server.url);
	let prompt = 0;
	let check = true;
	const wrong = () => new Error("what was loaded is not what was stored, so times mean nothing");
	const stack = (/** @type {Stack} */ on) => async () => {
		const stored = on.op(CHUNKS);
		if (check) {
			on.fill(stored);
		}
		const store = await on.store(stored);
		const loaded = on.elsewhere(stored);
		const load = await on.load(loaded);
		if (check && !on.fill(loaded, true)) {
			throw wrong();
		}
		return { store, load };
	};
	const sides = [
		stack(ours),
		stack(crossed),
		async () => {
			const asked = { prompt: ++prompt, chunks: CHUNKS };
			const store = await theirs.ask({ ...asked, do: "store" });
			const load = await theirs.ask({ ...asked, do: "load" });
			if (!load.same) {
				throw wrong();
			}
			return { store: store.ns / 1e6, load: load.ns / 1e6 };
		},
		async () => ({ store: await plain.run("gather"), load: await plain.run("gather") }),
	];
	/** @type {{ store: number, load: number }[][]} */
	const told = sides.map(() => []);
	await inTurns(sides, (side) => side(), PERIOD); // each pool is mapped by then
	check = false;
	for (let round = 0; round < WARM_UP; round++) {
		await stack(ours)();
	}
	for (let period = 0; period < 3; period++) {
		await crossed.client.clear();
		for (const [at, times] of (await inTurns(sides, (side) => side(), PERIOD)).entries()) {
			told[at]?.push(...times);
		}
	}
	await theirs.close();
	await crossed.close();
	await ours.close();
	await plain.close();
	await server.close();
	const size = `${(CHUNKS * OBJECT) / 2 ** 20} MiB`;
	return /** @type {const} */ (["store", "load"]).flatMap((what) => {
		const [us = [], cross = [], them = [], gather = []] = told.map((of) =>
			of.map((ms) => ms[what]),
		);
		const own = `${what} of ${size}: LMCache's client and server`;
		const copied = `${what} of ${size}: the host gather`;
		return [
			faster(`${own} ÷ ours; limit 2`, "ms", us, them),
			faster(`${own} ÷ our client on its server; limit 2`, "ms", cross, them),
			faster(`${copied} ÷ ours; limit 0.85`, "ms", us, gather),
			faster(`${copied} ÷ our client on LMCache's server`, "ms", cross, gather),
		];
	});
}

/** Tokens that vLLM is asked: the longer ones leave 184 to be computed after 11 chunks, the others one. */
const PROMPTS = [3000, 2817];
const CACHED = 2816;
const COLD = 2;
const WARM = 15;

/** Seconds to vLLM's first token: from nothing, and from either server. One engine before each, asked in turns. */
async function ttft() {
	const servers = [
		await Served.ours("--memory", "1GiB", "--chunk-size", "256", "--http-port", "off"),
		started(await Served.lmcache()),
	];
	const engines = await Promise.all(
		servers.map(({ address }) => VllmEngine.start(Number(address.split(":")[1]))),
	);
	/** What each prompt was answered first. @type {Map<string, number[]>} */
	const said = new Map();
	const ask = async (
		/** @type {VllmEngine} */ engine,
		/** @type {number} */ length,
		seed = 1,
		hit = CACHED,
	) => {
		const told = await engine.ask({ tokens: length, seed, reset: true });
		const prompt = `${length} of ${seed}`;
		const first = said.get(prompt) ?? told.tokens;
		said.set(prompt, first);
		if (told.cached !== hit || !isDeepStrictEqual(told.tokens, first)) {
			const found = `${told.cached} cached, ${told.tokens} for ${first}`;
			throw new Error(`vLLM's answer to ${prompt}: ${found}, so times mean nothing`);
		}
		return told.seconds;
	};
	const longest = Math.max(...PROMPTS);
	/** @type {number[]} */
	const colds = [];
	for (let seed = COLD; seed > 0; seed--) {
		const told = await inTurns(engines, (engine) => ask(engine, longest, seed, 0), 1);
		colds.push(...told.flat());
	}
	const cold = median(colds);
	/** @type {Row[]} */
	const rows = [];
	for (const length of PROMPTS) {
		await inTurns(engines, (engine) => ask(engine, length), 2);
		const [ours = [], theirs = []] = await inTurns(engines, (engine) => ask(engine, length), WARM);
		const name = `vLLM's first token of ${length} with ${CACHED} cached`;
		const limit = length === longest ? "; limit 0.95" : "";
		rows.push(paired(`${name}: our server ÷ LMCache's${limit}`, "s", ours, theirs));
		if (length === longest) {
			const none = ours.map(() => cold);
			rows.push(paired(`${name}: our server ÷ computed`, "s", ours, none));
			rows.push(paired(`${name}: LMCache's server ÷ computed`, "s", theirs, none));
		}
	}
	for (const engine of engines) {
		await engine[Symbol.asyncDispose]();
	}
	for (const served of servers) {
		await served.close();
	}
	return rows;
}

function started(/** @type {Served | string} */ served) {
	if (typeof served === "string") {
		throw new Error(served);
	}
	return served;
}
