import { createReadStream } from "node:fs";
import { createInterface } from "node:readline";
import type { Readable } from "node:stream";
import { pipeline } from "node:stream";
import { createGunzip } from "node:zlib";
import { invalid } from "../arguments.js";
import { KvferryError } from "../errors.js";
import { native } from "../native.js";
import { waitFor } from "../waiting.js";
import { replayOptions } from "./options.js";

/** Recorded requests; the blocks of all follow each other. */
export interface Trace {
	/** Milliseconds since the first. */
	readonly times: Float64Array;
	/** Blocks of each. */
	readonly lengths: Uint32Array;
	readonly blocks: Uint32Array;
}

/** `kvferry replay`: tells what a policy would have made of recorded requests. */
export async function replay(args: string[]): Promise<void> {
	const { file, capacity, policy, json } = replayOptions(args);
	const { times, lengths, blocks } = await readTrace(file);
	const begin = performance.now();
	const report = await waitFor(
		() => native().replay(times, lengths, blocks, capacity, policy),
		undefined,
	);
	const us = (performance.now() - begin) * 1000;
	const share = (part: number, whole: number) => (whole === 0 ? 0 : part / whole);
	const ratio = share(report.hits, report.blocks);
	process.stdout.write(
		json
			? `${JSON.stringify({
					requests: report.requests,
					blocks: report.blocks,
					hit_ratio: ratio,
					us_per_block: share(us, report.blocks),
					bytes_per_known_block: share(report.knownBytes, report.known),
				})}\n`
			: `${report.requests} requests of ${report.blocks} blocks, policy ${policy} with room for ${capacity}: ` +
					`${(100 * ratio).toFixed(2)} % of the blocks hit\n`,
	);
}

/**
 * Reads a trace: one JSON object a line with `timestamp` (milliseconds) and `hash_ids` (the request's blocks, each
 * named by the block and all before it, by a number or a text); what else it has is left alone. A name that ends in
 * `.gz` is of a compressed file.
 *
 * @throws {@link KvferryError} `SYSTEM` when the file cannot be read, `INVALID_ARGUMENT` with the line that is none.
 */
export async function readTrace(file: string): Promise<Trace> {
	const times: number[] = [];
	const lengths: number[] = [];
	const blocks: number[] = [];
	const numbers = new Map<unknown, number>();
	let line = 0;
	for await (const text of linesOf(file)) {
		line++;
		if (text.trim() === "") {
			continue;
		}
		const { timestamp, ids } = requestOf(text, `${file}, line ${line}`);
		times.push(timestamp);
		lengths.push(ids.length);
		for (const id of ids) {
			let number = numbers.get(id);
			if (number === undefined) {
				number = numbers.size;
				numbers.set(id, number);
			}
			blocks.push(number);
		}
	}
	const first = times.reduce((least, time) => Math.min(least, time), Number.POSITIVE_INFINITY);
	return {
		times: Float64Array.from(times, (time) => time - first),
		lengths: Uint32Array.from(lengths),
		blocks: Uint32Array.from(blocks),
	};
}

async function* linesOf(file: string): AsyncGenerator<string> {
	let failure: Error | undefined;
	let input: Readable = file === "-" ? process.stdin : createReadStream(file);
	if (file.endsWith(".gz")) {
		input = pipeline(input, createGunzip(), () => {}); // the loop below sees what goes wrong
	}
	input.on("error", (error) => {
		failure = error;
	});
	try {
		yield* createInterface({ input, crlfDelay: Number.POSITIVE_INFINITY });
	} catch (error) {
		failure ??= error as Error;
	}
	if (failure !== undefined) {
		throw new KvferryError("SYSTEM", `${file}: ${failure.message}`, { cause: failure });
	}
}

function requestOf(text: string, where: string): { timestamp: number; ids: unknown[] } {
	let request: { timestamp?: unknown; hash_ids?: unknown };
	try {
		request = JSON.parse(text);
	} catch (error) {
		throw invalid(`${where}: ${(error as Error).message}; give one JSON object a line.`);
	}
	const { timestamp, hash_ids: ids } = request ?? {};
	if (typeof timestamp !== "number" || !Number.isFinite(timestamp)) {
		throw invalid(
			`${where}: timestamp is ${JSON.stringify(timestamp)}, no number of milliseconds.`,
		);
	}
	if (!Array.isArray(ids) || !ids.every((id) => ["number", "string"].includes(typeof id))) {
		throw invalid(`${where}: hash_ids must be an array of numbers or texts.`);
	}
	return { timestamp, ids };
}
