import type { Server } from "../server.js";
import { type Given, oneOf } from "./values.js";

/** How `kvferry serve` logs. */
export type LogFormat = "text" | "json" | "off";

/** One line. */
export interface Entry {
	readonly level: "info" | "warn" | "error";
	readonly event: string;
	/** More of it, in words. */
	readonly detail: string;
	/** How often since the line before. */
	readonly count: number;
}

/** A stream that tells how much it holds. */
type Out = NodeJS.WritableStream & { readonly writableLength: number };

const FORMATS: readonly LogFormat[] = ["text", "json", "off"];
/** What happens again and again is one line in so many milliseconds, with its count. */
const PERIOD_MS = 1000;
/** Bytes that may wait for who reads the log; then lines are counted and left out. */
const WAITING_MAX = 1 << 20;

export function logFormat(given: Given): LogFormat {
	return oneOf(given, FORMATS);
}

/** One line, as it is written. */
export function line({ level, event, detail, count }: Entry, format: LogFormat, now: Date): string {
	const time = now.toISOString();
	if (format === "json") {
		return `${JSON.stringify({ time, level, event, detail, count })}\n`;
	}
	// A line is a line, whatever a path has in it.
	const plain = detail.replace(/\p{Cc}/gu, "\u{fffd}");
	return `${time} ${level} ${event}: ${plain}${count > 1 ? ` (${count} times)` : ""}\n`;
}

/** Writes what a server does to stderr. */
export class Log {
	readonly #format: LogFormat;
	readonly #out: Out;
	#timer: NodeJS.Timeout | undefined;
	#server: Server | undefined;
	#lost = 0;

	constructor(format: LogFormat, out: Out = process.stderr) {
		this.#format = format;
		this.#out = out;
		if (format !== "off") {
			out.on("error", () => {}); // who reads it is gone: the server goes on
		}
	}

	write(entry: Entry): void {
		if (this.#format === "off") {
			return;
		}
		if (this.#out.writableLength > WAITING_MAX) {
			this.#lost += entry.count;
			return;
		}
		if (this.#lost > 0) {
			const lost = { detail: "nobody read the log", count: this.#lost } as const;
			this.#lost = 0;
			this.#out.write(
				line({ level: "warn", event: "lines_lost", ...lost }, this.#format, new Date()),
			);
		}
		this.#out.write(line(entry, this.#format, new Date()));
	}

	/** Something that happened once. */
	info(event: string, detail: string): void {
		this.write({ level: "info", event, detail, count: 1 });
	}

	/** Writes what happens in the server until {@link Log.end}. */
	follow(server: Server): void {
		if (this.#format !== "off") {
			this.#server = server;
			this.#timer = setInterval(() => this.#look(), PERIOD_MS);
		}
	}

	/** Writes the last of it. The server must be there still. */
	end(): void {
		clearInterval(this.#timer);
		this.#look();
		this.#server = undefined;
	}

	#look(): void {
		for (const note of this.#server?.takeNotes() ?? []) {
			this.write(note);
		}
	}
}
