import { describe, expect, it } from "vitest";
import { drawStatus, type Sample } from "../../ts/cli/view.js";

const WIDE = { columns: 200, rows: 50 };

function sample(at: number, more: Record<string, number | string> = {}): Sample {
	const status = {
		...{ version: "1.2.3", pid: 7, uptime_seconds: 7300, chunk_size: 256 },
		...{ lookup_chunks: 100, hit_chunks: 50, pool_bytes: 2 ** 30, used_bytes: 2 ** 29 },
		...{ objects: 1234, stored_chunks: 10, stored_bytes: 2 ** 20 },
	};
	return { at, status: { ...status, ...more } };
}

describe("the view of a server", () => {
	it("has ratios of the last minute and since the start, rates, and what it holds", () => {
		const later = {
			lookup_chunks: 110,
			hit_chunks: 59,
			stored_chunks: 14,
			stored_bytes: 5 * 2 ** 20,
		};
		const text = drawStatus("u", [sample(0), sample(2, later)], "", WIDE).join("\n");
		expect(text).toMatch(/^kvferry 1\.2\.3 at u, process 7, up 2 h\n/);
		expect(text).toMatch(/hit ratio +90\.0 % of the last minute, 53\.6 % since the start/);
		expect(text).toMatch(/15,104 of 28,160 tokens/);
		expect(text).toMatch(/memory +\[#{10}\.{10}\] 512 MiB of 1 GiB, 1,234 objects/);
		expect(text).toMatch(/stored +2\.0 chunks\/s, 2 MiB\/s/);
		expect(text).not.toMatch(/disk|dropped|NO ANSWER/);
	});

	it("names what was dropped, a disk and its failure, and a server that does not answer", () => {
		const disk = {
			disk_bytes: 2 ** 30,
			disk_used_bytes: 0,
			disk_failure: "no room",
			damaged_chunks: 2,
		};
		const text = drawStatus("u", [sample(0, disk)], "gone", WIDE).join("\n");
		expect(text).toMatch(/\nNO ANSWER: gone\n/);
		expect(text).toMatch(/\ndisk .*\n +FAILED: no room\n/);
		expect(text).toMatch(/\ndropped +2 chunks, damaged; 0 in the last minute\n/);
	});

	it("keeps to the screen, and lets nothing of a server steer the terminal", () => {
		const rude = sample(0, { version: "\x1b[2J\x9b\r\n" });
		const lines = drawStatus("u", [rude], "", { columns: 30, rows: 4 });
		expect(lines).toHaveLength(4);
		for (const line of lines) {
			expect([...line].length).toBeLessThanOrEqual(30);
			expect(line).not.toMatch(/\p{Cc}/u);
		}
	});
});
