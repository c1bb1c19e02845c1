import { Writable } from "node:stream";
import { describe, expect, it } from "vitest";
import { type Entry, Log, line } from "../../ts/cli/log.js";

const NOW = new Date(0);
const ENTRY: Entry = { level: "warn", event: "messages_dropped", detail: 'a\n"b"', count: 3 };

describe("a line", () => {
	it("is one JSON object, or words", () => {
		expect(line(ENTRY, "json", NOW)).toBe(
			'{"time":"1970-01-01T00:00:00.000Z","level":"warn","event":"messages_dropped","detail":"a\\n\\"b\\"","count":3}\n',
		);
		expect(line(ENTRY, "text", NOW)).toBe(
			'1970-01-01T00:00:00.000Z warn messages_dropped: a\u{fffd}"b" (3 times)\n',
		);
		expect(line({ ...ENTRY, count: 1 }, "text", NOW)).not.toContain("times");
	});
});

describe("a log", () => {
	it("writes nothing where it is off", () => {
		const written: string[] = [];
		const out = new Writable({
			write: (chunk, _, done) => {
				written.push(String(chunk));
				done();
			},
		});
		new Log("off", out).write(ENTRY);
		expect(written).toEqual([]);
		new Log("text", out).write(ENTRY);
		expect(written).toHaveLength(1);
	});

	it("counts what a reader that stands still would miss, and tells it later", () => {
		const written: string[] = [];
		let go = (): void => {};
		const out = new Writable({
			write: (chunk, _, done) => {
				written.push(String(chunk));
				go = done;
			},
		});
		const log = new Log("json", out);
		const long = { ...ENTRY, detail: "x".repeat(2 ** 20) };
		log.write(long); // waits in the stream
		log.write(ENTRY);
		log.write(ENTRY);
		expect(out.writableLength).toBeLessThan(2 ** 20 + 1000);
		go();
		log.write({ ...ENTRY, count: 1 });
		go();
		go();
		const events = written.slice(1).map((line) => JSON.parse(line));
		expect(events).toEqual([
			expect.objectContaining({ event: "lines_lost", count: 6 }),
			expect.objectContaining({ event: "messages_dropped", count: 1 }),
		]);
	});
});
