// `npm run simulate -- --seed S --requests N [--cuda]`: simulated engines over a real store, with faults; see
// test/simulator/. Runs seed S and those after it until N requests have been simulated. With `--cuda` their KV
// memory is that of a GPU, by the fake driver. `--defect NAME`
// makes a deliberate defect real, which must be noticed. `--defects` does so with one after the other, from
// seed 1 on, and fails if one is not noticed within a minute.

import { fork } from "node:child_process";
import { createRequire } from "node:module";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { simulate } from "../test/simulator/world.mjs";
import { buildFakeCuda } from "./fake-cuda.mjs";
import { root, setup } from "./setup.mjs";
import { addonOf, buildSimulator, simulatorRoot } from "./simulator-build.mjs";

/** Requests of one seed. */
const REQUESTS = 400;
const SEED_LIMIT_MS = 60_000;

/** @typedef {{ seed: number, message: string }} Violation */
/** The seeds of one process: the clock and the defects are a process's own. */
/** @typedef {{ from: number, step: number, seeds: number, requests: number, defect: string | undefined, cuda: boolean }} Share */

if (process.send === undefined) {
	await main();
} else {
	process.once("message", (share) => work(/** @type {Share} */ (share)));
}

async function main() {
	const { values } = parseArgs({
		options: {
			seed: { type: "string" },
			requests: { type: "string" },
			defect: { type: "string" },
			defects: { type: "boolean", default: false },
			cuda: { type: "boolean", default: false },
			"no-build": { type: "boolean", default: false },
		},
	});
	if (!values["no-build"]) {
		setup();
		await buildSimulator();
	}
	if (values.cuda) {
		// The children find it there.
		process.env.LD_LIBRARY_PATH = buildFakeCuda();
	}
	if (values.defects) {
		await noticeDefects();
		return;
	}
	const seed = number("seed", values.seed ?? String(Math.floor(Math.random() * 2 ** 31)));
	const requests = number("requests", values.requests ?? String(REQUESTS));
	const seeds = Math.max(1, Math.ceil(requests / REQUESTS));
	const begin = performance.now();
	const { sum, violation } = await runSeeds(
		seed,
		seeds,
		Math.ceil(requests / seeds),
		values.defect,
		values.cuda,
	);
	const facts = Object.entries(sum).map(([name, count]) => `${count} ${words(name)}`);
	console.log(facts.join(", "));
	if (violation !== undefined) {
		console.error(
			`\n${violation.message}\nreplay: npm run simulate -- --seed ${violation.seed}${values.cuda ? " --cuda" : ""}`,
		);
		process.exitCode = 1;
		return;
	}
	const seconds = ((performance.now() - begin) / 1000).toFixed(1);
	console.log(
		`${sum.requests} requests simulated over ${seeds} seeds from ${seed}${
			values.cuda ? " with CUDA" : ""
		} in ${seconds} s, no violation`,
	);
}

/** Makes each defect real until it is noticed. */
async function noticeDefects() {
	for (const defect of load().addon.simulatorDefects()) {
		const begin = performance.now();
		const seconds = () => ((performance.now() - begin) / 1000).toFixed(1);
		/** @type {Violation | undefined} */
		let violation;
		for (let seed = 1; violation === undefined && Number(seconds()) < 60; seed += 20) {
			({ violation } = await runSeeds(seed, 20, REQUESTS, defect));
		}
		if (violation === undefined) {
			console.error(`${defect}: not noticed in ${seconds()} s`);
			process.exitCode = 1;
		} else {
			console.log(`${defect}: noticed in ${seconds()} s: ${violation.message}`);
		}
	}
}

/** @param {number} seed @param {number} seeds @param {number} requests @param {string | undefined} defect @param {boolean} cuda */
async function runSeeds(seed, seeds, requests, defect, cuda = false) {
	const processes = Math.min(availableParallelism(), seeds);
	/** @type {Record<string, number>} */
	const sum = {};
	const results = await Promise.all(
		Array.from({ length: processes }, (_, i) => {
			const share = { from: seed + i, step: processes, seeds: Math.ceil((seeds - i) / processes) };
			return start({ ...share, requests, defect, cuda }, sum);
		}),
	);
	return { sum, violation: results.find((result) => result !== undefined) };
}

/** @param {Share} share @param {Record<string, number>} sum @returns {Promise<Violation | undefined>} */
function start(share, sum) {
	return new Promise((resolve, reject) => {
		const child = fork(fileURLToPath(import.meta.url));
		/** @type {Violation | undefined} */
		let violation;
		let done = 0;
		// A seed takes about a second; one that takes so long hangs or goes round in circles.
		const late = () => {
			const seed = share.from + done * share.step;
			violation ??= { seed, message: `seed ${seed} has not ended after ${SEED_LIMIT_MS / 1000} s` };
			child.kill("SIGKILL");
		};
		let timer = setTimeout(late, SEED_LIMIT_MS);
		child.on("message", (/** @type {any} */ message) => {
			clearTimeout(timer);
			timer = setTimeout(late, SEED_LIMIT_MS);
			if ("violation" in message) {
				violation = { seed: message.seed, message: message.violation };
				return;
			}
			done++;
			for (const [name, count] of Object.entries(message.counts)) {
				sum[name] = (sum[name] ?? 0) + /** @type {number} */ (count);
			}
		});
		child.once("error", reject);
		child.once("close", (code, signal) => {
			clearTimeout(timer);
			const seed = share.from + done * share.step;
			if (code === 0 && violation === undefined && done < share.seeds) {
				resolve({ seed, message: `seed ${seed} never ended: something in it waits for ever` });
			} else if (code === 0 || violation !== undefined) {
				resolve(violation);
			} else {
				reject(
					new Error(`the simulation of seeds from ${share.from} ended with ${code ?? signal}`),
				);
			}
		});
		child.send(share);
	});
}

/** One process's seeds. @param {Share} share */
async function work({ from, step, seeds, requests, defect, cuda }) {
	const { addon } = load();
	/** @type {typeof import("../ts/index.js")} */
	const kvferry = await import(pathToFileURL(join(simulatorRoot, "dist", "index.js")).href);
	addon.simulatorDefect(defect);
	for (let i = 0; i < seeds; i++) {
		const seed = from + i * step;
		try {
			process.send?.({ counts: await simulate(kvferry, addon, seed, requests, cuda) });
		} catch (error) {
			const violation = error instanceof Error ? error.message : String(error);
			// What the seed has begun would hold the process.
			process.send?.({ seed, violation }, () => process.exit(0));
			return;
		}
	}
	process.disconnect();
}

function load() {
	const addon = createRequire(join(root, "package.json"))(addonOf(simulatorRoot));
	return { addon };
}

/** @param {string} name @param {string} text */
function number(name, text) {
	const value = Number(text);
	if (!Number.isSafeInteger(value) || value < 0 || text.trim() === "") {
		throw new Error(`--${name} is ${text}: it must be a whole number from 0 on`);
	}
	return value;
}

/** @param {string} name */
function words(name) {
	return name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`);
}
