// `npm run demo [-- --json] [--model FILE.gguf] [--repetitions N] [--embedded --disk DIR]`: a long document is read by one
// process, and asked about by others. What they share is in a server; with --embedded, in files in DIR that each
// process reads by itself, so that nothing else runs. All set-up is done here; progress goes to stderr, the result to
// stdout.

import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { resolve } from "node:path";
import { parseArgs } from "node:util";
import { buildAddon, buildJavaScript } from "./build.mjs";
import { example, fetchModel, installEngine } from "./engine.mjs";
import { startServer } from "./serve.mjs";
import { fail, setup, step } from "./setup.mjs";

/**
 * @typedef {object} Run What one engine process reports.
 * @property {number} ttft_ms
 * @property {number} prompt_tokens
 * @property {number} hit_tokens
 * @property {number} output_tokens
 * @property {number} loaded_bytes
 * @property {number} stored_bytes
 * @property {string} response
 * @property {string} [failure]
 */

const QUESTION = "Which vessel may sail when there is thick ice, and why?";
const OTHER = "When does the first boat leave Norrvik in summer?";

/** Each is a process of its own; `cold` comes first, so that the others find what it has left. */
const RUNS = /** @type {const} */ ([
	{ name: "cold", question: QUESTION, cached: true },
	{ name: "warm", question: QUESTION, cached: true },
	{ name: "warm_other", question: OTHER, cached: true },
	{ name: "control", question: QUESTION, cached: false },
	{ name: "control_other", question: OTHER, cached: false },
]);
const LABELS = {
	cold: "cold: nothing stored yet",
	warm: "warm: new process, same question",
	warm_other: "warm: new process, other question",
	control: "without cache, same question",
	control_other: "without cache, other question",
};

const options = readOptions();
setup();
buildAddon();
buildJavaScript();
installEngine();
const model = options.model ?? (await fetchModel());

if (options.disk === undefined) {
	step("kvferry serve");
}
const server = options.disk === undefined ? await startServer(`demo-${process.pid}`) : undefined;
const shared = server === undefined ? ["--disk", String(options.disk)] : ["--url", server.url];
// Each run is a tenant of its own, so that it begins with nothing, whatever an earlier one left in DIR.
const tenant = `${process.pid}-${Date.now()}`;
const results = new Map(RUNS.map(({ name }) => [name, /** @type {Run[]} */ ([])]));
try {
	for (let repetition = 1; repetition <= options.repetitions; repetition++) {
		step(`repetition ${repetition} of ${options.repetitions}`);
		for (const { name, question, cached } of RUNS) {
			const cache = cached ? [...shared, "--salt", `${tenant}-${repetition}`] : [];
			const run = await engine([...cache, "--question", question]);
			results.get(name)?.push(run);
			console.error(
				`${LABELS[name].padEnd(36)} ${run.ttft_ms.toFixed(0).padStart(6)} ms to the first token` +
					(run.failure === undefined ? "" : ` (${run.failure})`),
			);
		}
	}
} finally {
	await server?.end();
}

const rows = RUNS.map(({ name }) => ({ name, ...summary(results.get(name) ?? []) }));
const identical =
	answersAgree("cold", "warm", "control") && answersAgree("warm_other", "control_other");
if (options.json) {
	const figures = rows.map(({ name, ttft_ms, prompt_tokens, hit_tokens, output_tokens }) => [
		name,
		{ ttft_ms, prompt_tokens, hit_tokens, output_tokens },
	]);
	console.log(JSON.stringify({ ...Object.fromEntries(figures), identical }));
} else {
	printTable();
}
process.exitCode = identical ? 0 : 1;

function readOptions() {
	const { values } = parseArgs({
		options: {
			json: { type: "boolean", default: false },
			model: { type: "string" },
			repetitions: { type: "string", default: "3" },
			embedded: { type: "boolean", default: false },
			disk: { type: "string" },
		},
	});
	const repetitions = Number(values.repetitions);
	if (!Number.isInteger(repetitions) || repetitions < 1) {
		fail(`--repetitions ${values.repetitions}: give a number of runs, at least 1.`);
	}
	if (values.model !== undefined && !existsSync(values.model)) {
		fail(`--model ${values.model}: there is no such file.`);
	}
	if (values.embedded !== (values.disk !== undefined)) {
		fail("--embedded and --disk DIR go together: the cache in each process, its chunks in DIR.");
	}
	const disk = values.disk === undefined ? undefined : resolve(values.disk);
	const own = values.model === undefined ? undefined : resolve(values.model);
	return { json: values.json, model: own, repetitions, disk };
}

/**
 * One run of examples/llama-chat/engine.mjs.
 *
 * @returns {Promise<Run>}
 */
async function engine(/** @type {string[]} */ args) {
	const child = spawn(process.execPath, ["engine.mjs", "--model", model, ...args], {
		cwd: example,
		stdio: ["ignore", "pipe", "inherit"],
	});
	let output = "";
	child.stdout.setEncoding("utf8").on("data", (text) => {
		output += text;
	});
	const code = await new Promise((resolve, reject) => {
		child.once("error", reject).once("close", resolve);
	});
	if (code !== 0) {
		await server?.end();
		fail(`examples/llama-chat/engine.mjs failed with exit code ${code}`);
	}
	return JSON.parse(output);
}

/** The medians over all repetitions. */
function summary(/** @type {Run[]} */ runs) {
	const median = (/** @type {(run: Run) => number} */ figure) => {
		const sorted = runs.map(figure).sort((a, b) => a - b);
		const [low = Number.NaN, high = low] = sorted.slice((sorted.length - 1) >> 1);
		return sorted.length % 2 === 1 ? low : (low + high) / 2;
	};
	return {
		ttft_ms: median((run) => run.ttft_ms),
		prompt_tokens: median((run) => run.prompt_tokens),
		hit_tokens: median((run) => run.hit_tokens),
		output_tokens: median((run) => run.output_tokens),
		loaded_bytes: median((run) => run.loaded_bytes),
		stored_bytes: median((run) => run.stored_bytes),
	};
}

/** Whether all repetitions of these runs gave one and the same answer. */
function answersAgree(/** @type {(typeof RUNS)[number]["name"][]} */ ...names) {
	const answers = names.flatMap((name) => results.get(name)?.map(({ response }) => response) ?? []);
	return new Set(answers).size === 1;
}

function printTable() {
	const megabytes = (/** @type {number} */ bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
	const cells = rows.map((row) => [
		LABELS[row.name],
		`${row.ttft_ms.toFixed(0)} ms`,
		`${row.hit_tokens} of ${row.prompt_tokens}`,
		megabytes(row.loaded_bytes),
		megabytes(row.stored_bytes),
	]);
	const table = [["", "first token", "tokens reused", "loaded", "stored"], ...cells];
	const widths = [0, 1, 2, 3, 4].map((i) => Math.max(...table.map((row) => row[i]?.length ?? 0)));
	console.log();
	for (const row of table) {
		const padded = row.map((cell, i) =>
			i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0),
		);
		console.log(padded.join("  "));
	}
	const [cold, warm] = rows;
	const factor = (cold?.ttft_ms ?? 0) / (warm?.ttft_ms ?? 1);
	console.log(
		`\nThe first token comes ${factor.toFixed(1)} times sooner (medians of ${options.repetitions}), ` +
			`and the answers are ${identical ? "the same" : "NOT the same"} as without the cache.`,
	);
	for (const [question, run] of [
		[QUESTION, results.get("warm")?.[0]],
		[OTHER, results.get("warm_other")?.[0]],
	]) {
		console.log(`\n${question}\n  ${/** @type {Run} */ (run).response.trim()}`);
	}
}
