// What is left of the ideal when 1,024 tokens come from a server in another process: the engine's own
// load of the same bytes from the same file in memory, and evaluating the rest of the prompt. Ours and
// the ideal take turns within one run.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { example, fetchModel, installEngine } from "../../scripts/engine.mjs";
import { startServer } from "../../scripts/serve.mjs";
import { load, median } from "./rows.mjs";

const HIT = 1024;
const PROMPT = 1100;
const LOADS = 31;
const ANSWERS = 21;

/**
 * Milliseconds.
 *
 * @returns {Promise<import("./rows.mjs").Row[]>}
 */
export default async function ttft() {
	installEngine();
	const engine = await openEngine(await fetchModel());
	const { Client } = await load();
	/** @type {typeof import("../../ts/engines/llama-cpp.js")} */
	const { LlamaPrefixCache } = await import(
		new URL("../../dist/engines/llama-cpp.js", import.meta.url).href
	);
	const server = await startServer(`bench-${process.pid}`);
	try {
		const client = await Client.connect({ url: server.url });
		const cache = await LlamaPrefixCache.open({ context: engine.context, via: client });
		const rows = await compare(cache, engine);
		await cache.close();
		await client.close();
		return rows;
	} finally {
		await server.end();
		await engine.llama.dispose();
	}
}

async function compare(
	/** @type {import("../../ts/engines/llama-cpp.js").LlamaPrefixCache} */ cache,
	/** @type {Awaited<ReturnType<typeof openEngine>>} */ { context, tokens },
) {
	const sequence = context.getSequence();
	await sequence.evaluateWithoutGeneratingNewTokens(tokens.slice(0, HIT));
	const saved = await cache.save(sequence);
	if (saved.storedTokens !== HIT) {
		throw new Error(`stored ${saved.storedTokens} tokens: ${saved.failure?.message}`);
	}
	// The memfd that ours is assembled in keeps its bytes after the load: the ideal loads just them.
	const load = sequence.loadStateFromFile.bind(sequence);
	let path = "";
	sequence.loadStateFromFile = (/** @type {string} */ file, /** @type {object} */ options) => {
		path = file;
		return load(file, options);
	};

	const ideal = async () => {
		await sequence.clearHistory();
		await load(path, { acceptRisk: true });
	};
	const ours = async () => {
		const { hitTokens, lookupMs, failure } = await cache.restore(sequence, tokens);
		if (hitTokens !== HIT) {
			throw new Error(`loaded ${hitTokens} tokens: ${failure?.message}`);
		}
		return lookupMs;
	};
	const firstToken = async () => {
		const rest = sequence.evaluate(tokens.slice(HIT), { temperature: 0 });
		const { value } = await rest.next();
		await rest.return();
		return value;
	};
	const answer = async (/** @type {() => Promise<unknown>} */ restore) => {
		await restore();
		return await firstToken();
	};
	const clear = () => sequence.clearHistory();
	await clear();
	const first = await answer(ours);
	await clear();
	if ((await answer(ideal)) !== first) {
		throw new Error("the first tokens differ, so times mean nothing");
	}
	/** @type {number[]} */
	const lookups = [];
	const loads = await turns(LOADS, async () => lookups.push(await ours()), ideal, clear);
	/** @type {[number, number][]} */
	const withoutLookup = loads.map(([ours, ideal], i) => [ours - (lookups[i] ?? 0), ideal]);
	return [
		row(`${HIT} tokens: assemble, check, load ÷ load`, withoutLookup),
		row(`${HIT} tokens: look up, assemble, check, load ÷ load`, loads),
		row(
			`first token of ${PROMPT} with ${HIT} stored ÷ ideal`,
			await turns(
				ANSWERS,
				() => answer(ours),
				() => answer(ideal),
				clear,
			),
		),
	];
}

/** Times `a` and `b` in turns, each after `prepare`. */
async function turns(
	/** @type {number} */ pairs,
	/** @type {() => Promise<unknown>} */ a,
	/** @type {() => Promise<unknown>} */ b,
	/** @type {() => Promise<unknown>} */ prepare,
) {
	const time = async (/** @type {() => Promise<unknown>} */ work) => {
		await prepare();
		const start = performance.now();
		await work();
		return performance.now() - start;
	};
	/** @type {[number, number][]} */
	const times = [];
	for (let pair = 0; pair < pairs; pair++) {
		if (pair % 2 === 0) {
			times.push([await time(a), await time(b)]);
		} else {
			const second = await time(b);
			times.push([await time(a), second]);
		}
	}
	return times;
}

function row(/** @type {string} */ name, /** @type {[number, number][]} */ times) {
	const ours = median(times.map(([a]) => a));
	const reference = median(times.map(([, b]) => b));
	return { name, ours, reference, unit: "ms", ratio: ours / reference };
}

async function openEngine(/** @type {string} */ modelPath) {
	const require = createRequire(join(example, "package.json"));
	const { getLlama, LlamaLogLevel } = await import(
		pathToFileURL(require.resolve("node-llama-cpp")).href
	);
	const llama = await getLlama({
		build: "never",
		gpu: false,
		skipDownload: true,
		logLevel: LlamaLogLevel.error,
	});
	const model = await llama.loadModel({ modelPath });
	const context = await model.createContext({ contextSize: 2048, batchSize: 512, threads: 1 });
	const document = readFileSync(join(example, "document.txt"), "utf8");
	/** @type {number[]} */
	const tokens = model.tokenize(document).slice(0, PROMPT);
	return { llama, context, tokens };
}
