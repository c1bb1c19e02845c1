import { execFile, spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { gzipSync } from "node:zlib";
import { afterAll, describe, expect, it } from "vitest";
import { readTrace } from "../../ts/cli/replay.js";

const main = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));
const conversations = fileURLToPath(
	new URL("../traces/conversation_trace.jsonl.gz", import.meta.url),
);
const directory = mkdtempSync(join(tmpdir(), "kvferry-replay-"));
afterAll(() => rmSync(directory, { recursive: true }));

async function replay(file: string, capacity: number, policy: string) {
	const args = ["replay", file, "--capacity", String(capacity), "--policy", policy, "--json"];
	const { stdout } = await promisify(execFile)(process.execPath, [main, ...args]);
	return JSON.parse(stdout) as { requests: number; blocks: number; hit_ratio: number };
}

function written(name: string, text: string | Uint8Array): string {
	const file = join(directory, name);
	writeFileSync(file, text);
	return file;
}

/** The least recently used goes after each request, of one request the last first. */
function leastRecentlyUsed(requests: readonly (readonly number[])[], capacity: number): number {
	const resident = new Set<number>();
	let hits = 0;
	for (const blocks of requests) {
		const missing = blocks.findIndex((block) => !resident.has(block));
		hits += missing < 0 ? blocks.length : missing;
		for (const block of blocks.toReversed()) {
			resident.delete(block);
			resident.add(block);
		}
		for (const block of resident) {
			if (resident.size <= capacity) {
				break;
			}
			resident.delete(block);
		}
	}
	return hits;
}

describe("kvferry replay", () => {
	it("counts what a plain model of the least recently used counts", async () => {
		const { lengths, blocks } = await readTrace(conversations);
		let at = 0;
		const requests = Array.from(lengths, (length) => {
			at += length;
			return Array.from(blocks.subarray(at - length, at));
		});
		for (const capacity of [1000, 10_000]) {
			expect(await replay(conversations, capacity, "lru")).toMatchObject({
				requests: 12_031,
				blocks: 288_500,
				hit_ratio: leastRecentlyUsed(requests, capacity) / 288_500,
			});
		}
	});

	it("hits more with our policy than with the others, and hardly ever less", async () => {
		const ratio = async (capacity: number, policy: string) =>
			(await replay(conversations, capacity, policy)).hit_ratio;
		expect(await ratio(10_000, "default")).toBeGreaterThan(0.24);
		expect(await ratio(10_000, "arc")).toBeGreaterThan(0.22);
		expect(await ratio(10_000, "s3fifo")).toBeGreaterThan(0.19);
		for (const capacity of [1000, 5000, 20_000, 50_000, 100_000]) {
			const lru = await ratio(capacity, "lru");
			expect(await ratio(capacity, "default")).toBeGreaterThan(lru - 0.002);
		}
	}, 60_000);

	it("takes blocks named by texts, empty lines, and other fields; and stdin", () => {
		const lines = [
			{ timestamp: 5, hash_ids: ["a", "b"], input_length: 1024 },
			{ timestamp: 6, hash_ids: ["a", "b", "c"] },
			{ timestamp: 7, hash_ids: [] },
		];
		const input = `${lines.map((line) => JSON.stringify(line)).join("\n\n")}\n`;
		const args = [main, "replay", "-", "--capacity", "3"];
		const { status, stdout } = spawnSync(process.execPath, args, { input, encoding: "utf8" });
		expect({ status, stdout }).toEqual({
			status: 0,
			stdout: "3 requests of 5 blocks, policy default with room for 3: 40.00 % of the blocks hit\n",
		});
	});

	it("of nothing is nothing", async () => {
		const nothing = { requests: 0, blocks: 0, hit_ratio: 0 };
		expect(await replay(written("empty.jsonl", ""), 5, "default")).toMatchObject(nothing);
	});
});

describe("a trace", () => {
	it.each([
		["no JSON", "{", "line 2"],
		["no object", "null", "timestamp"],
		["no time", '{"hash_ids":[1]}', "timestamp is undefined"],
		["a text for a time", '{"timestamp":"1","hash_ids":[1]}', 'timestamp is "1"'],
		["no blocks", '{"timestamp":1}', "hash_ids"],
		["a block that is no name", '{"timestamp":1,"hash_ids":[null]}', "hash_ids"],
	])("with %s is refused with its line", async (name, line, named) => {
		const file = written(`${name}.jsonl`, `{"timestamp":0,"hash_ids":[1]}\n${line}\n`);
		await expect(readTrace(file)).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringMatching(new RegExp(`line 2.*${named}|${named}`)),
		});
	});

	it.each([
		["is not there", "missing.jsonl", undefined],
		["is not compressed", "plain.jsonl.gz", "{}"],
		["is cut", "cut.jsonl.gz", gzipSync('{"timestamp":0,"hash_ids":[1]}\n').subarray(0, -9)],
	])("that %s is an error that names it", async (_, name, bytes) => {
		const file = bytes === undefined ? join(directory, name) : written(name, bytes);
		await expect(readTrace(file)).rejects.toMatchObject({
			code: "SYSTEM",
			message: expect.stringContaining(name),
		});
	});
});
