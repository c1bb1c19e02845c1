import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";
import { invalid, named, shown } from "../arguments.js";
import { KvferryError } from "../errors.js";

/**
 * The token ids in a file: a JSON array, or integers between white space. "-" is stdin.
 *
 * @throws {@link KvferryError} `SYSTEM` when the file cannot be read, `INVALID_TOKEN` with the
 * position of what is no token id.
 */
export async function readTokens(file: string): Promise<Uint32Array> {
	let written: string;
	try {
		written = file === "-" ? await text(process.stdin) : await readFile(file, "utf8");
	} catch (error) {
		throw new KvferryError("SYSTEM", `--tokens ${file}: ${(error as Error).message}`, {
			cause: error,
		});
	}
	return parseTokens(written, file);
}

/** The same of the file's text. */
export function parseTokens(text: string, file: string): Uint32Array {
	const trimmed = text.trim();
	const isJson = trimmed.startsWith("[");
	const words = trimmed === "" ? [] : trimmed.split(/\s+/);
	const ids = isJson ? fromJson(trimmed, file) : words.map(toInteger);
	const wrong = ids.findIndex((id) => !Number.isInteger(id) || id < 0 || id > 0xffff_ffff);
	if (wrong >= 0) {
		throw new KvferryError(
			"INVALID_TOKEN",
			`--tokens ${file}: token ${wrong} is ${isJson ? named(ids[wrong]) : shown(words[wrong])}, no integer from 0 to 2^32 - 1; ` +
				"the file has a JSON array of them, or integers between white space.",
		);
	}
	return Uint32Array.from(ids);
}

function fromJson(text: string, file: string): number[] {
	try {
		return JSON.parse(text) as number[];
	} catch (error) {
		throw invalid(`--tokens ${file}: ${(error as Error).message}; give a JSON array of token ids.`);
	}
}

function toInteger(word: string): number {
	return /^\d+$/.test(word) ? Number(word) : Number.NaN;
}
