// Our eviction policy against the least recently used one, by replaying recorded requests through the store's real
// code path; and what it costs. `KVFERRY_BENCH_TRACE=FILE` replays another trace.

import { fileURLToPath } from "node:url";
import { capture } from "../../scripts/setup.mjs";
import { median } from "./rows.mjs";

const main = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));
const file =
	process.env.KVFERRY_BENCH_TRACE ??
	fileURLToPath(new URL("../../test/traces/conversation_trace.jsonl.gz", import.meta.url));
const CAPACITIES = [1000, 5000, 10_000, 20_000, 50_000, 100_000];
const OTHERS = ["lru", "arc", "s3fifo"];
const REPETITIONS = 5;

/** Hit ratios; microseconds of a whole lookup and store for each block; bytes for each block that is known. */
export default async function eviction() {
	/** @type {import("./rows.mjs").Row[]} */
	const rows = [];
	const replay = (/** @type {number} */ capacity, /** @type {string} */ policy) => {
		const args = ["replay", file, "--capacity", String(capacity), "--policy", policy, "--json"];
		return JSON.parse(capture(process.execPath, [main, ...args]));
	};
	for (const capacity of CAPACITIES) {
		const ours = replay(capacity, "default");
		for (const policy of OTHERS) {
			const reference = replay(capacity, policy).hit_ratio;
			rows.push({
				name: `hit ratio with room for ${capacity} blocks, ours ÷ ${policy}`,
				ours: ours.hit_ratio,
				reference,
				unit: "",
				ratio: ours.hit_ratio / reference,
			});
		}
		const costs = Array.from({ length: REPETITIONS }, () => ({
			ours: replay(capacity, "default").us_per_block,
			lru: replay(capacity, "lru").us_per_block,
		}));
		const more = median(costs.map(({ ours, lru }) => ours - lru));
		rows.push(
			limit(`a block looked up and stored, room for ${capacity}; beside lru`, more, 2, "µs"),
		);
		rows.push(
			limit("bytes of a block that is known, there or not", ours.bytes_per_known_block, 64, "B"),
		);
	}
	return rows;
}

function limit(
	/** @type {string} */ name,
	/** @type {number} */ ours,
	/** @type {number} */ reference,
	/** @type {string} */ unit,
) {
	return { name, ours, reference, unit, ratio: ours / reference };
}
