// A real browser, driven over a pipe with Chrome's own protocol: JSON that ends with a NUL.

import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Readable, Writable } from "node:stream";

type Params = Record<string, unknown>;

interface Message {
	readonly id?: number;
	readonly method?: string;
	readonly params?: Params;
	readonly result?: Params;
	readonly error?: { readonly message: string };
}

/** The browser's program; undefined where there is none. */
export function findBrowser(): string | undefined {
	for (const name of ["chromium", "chromium-browser", "google-chrome"]) {
		try {
			return execFileSync("which", [name], { encoding: "utf8", stdio: "pipe" }).trim();
		} catch {
			// the next one
		}
	}
	return undefined;
}

/** One page in a browser of its own. */
export class Browser implements AsyncDisposable {
	/** Addresses that the page asked for. */
	readonly requests: string[] = [];
	/** What the page complained of. */
	readonly complaints: string[] = [];
	readonly #child: ChildProcess;
	readonly #home: string;
	readonly #answers = new Map<number, (message: Message) => void>();
	readonly #ended: Promise<unknown>;
	#next = 0;
	#session: string | undefined;

	private constructor(child: ChildProcess, home: string) {
		this.#child = child;
		this.#home = home;
		this.#ended = new Promise((resolve) => child.once("exit", resolve).once("error", resolve));
		this.#ended.then(() => {
			for (const answer of this.#answers.values()) {
				answer({ error: { message: "the browser has ended" } });
			}
		});
		let rest = "";
		(child.stdio[4] as Readable).setEncoding("utf8").on("data", (text: string) => {
			const messages = (rest + text).split("\0");
			rest = messages.pop() ?? "";
			for (const message of messages) {
				this.#hear(JSON.parse(message));
			}
		});
	}

	static async start(program: string): Promise<Browser> {
		const home = mkdtempSync(join(tmpdir(), "kvferry-browser-"));
		const flags = [
			...["--headless=new", "--remote-debugging-pipe", `--user-data-dir=${home}`],
			...["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"],
			...["--disable-background-networking", "--disable-component-update", "--disable-sync"],
			...(process.getuid?.() === 0 ? ["--no-sandbox"] : []), // as root it has none
		];
		// A group of its own: its helpers write to its home for a while after it was killed.
		const stdio = ["ignore", "ignore", "ignore", "pipe", "pipe"] as const;
		const child = spawn(program, flags, { stdio: [...stdio], detached: true });
		const browser = new Browser(child, home);
		try {
			await browser.#attach();
		} catch (error) {
			await browser[Symbol.asyncDispose]();
			throw error;
		}
		return browser;
	}

	async #attach(): Promise<void> {
		const { targetId } = await this.#call("Target.createTarget", { url: "about:blank" });
		const attached = await this.#call("Target.attachToTarget", { targetId, flatten: true });
		this.#session = attached.sessionId as string;
		for (const domain of ["Network", "Page", "Runtime", "Log"]) {
			await this.#call(`${domain}.enable`);
		}
	}

	async open(url: string): Promise<void> {
		await this.#call("Page.navigate", { url });
	}

	/** In CSS pixels. */
	async resize(width: number, height: number): Promise<void> {
		const metrics = { width, height, deviceScaleFactor: 1, mobile: false };
		await this.#call("Emulation.setDeviceMetricsOverride", metrics);
	}

	/** What an expression is in the page. */
	async evaluate<T>(expression: string): Promise<T> {
		const evaluated = await this.#call("Runtime.evaluate", { expression, returnByValue: true });
		if (evaluated.exceptionDetails !== undefined) {
			throw new Error(`${expression}: ${JSON.stringify(evaluated.exceptionDetails)}`);
		}
		return (evaluated.result as { value: T }).value;
	}

	async #call(method: string, params: Params = {}): Promise<Params> {
		this.#next += 1;
		const id = this.#next;
		const answered = new Promise<Message>((resolve) => this.#answers.set(id, resolve));
		const session = this.#session === undefined ? {} : { sessionId: this.#session };
		(this.#child.stdio[3] as Writable).write(
			`${JSON.stringify({ id, method, params, ...session })}\0`,
		);
		const { result = {}, error } = await answered;
		if (error !== undefined) {
			throw new Error(`${method}: ${error.message}`);
		}
		return result;
	}

	#hear({ id, method, params, ...answer }: Message): void {
		if (id !== undefined) {
			this.#answers.get(id)?.(answer);
			this.#answers.delete(id);
		} else if (method === "Network.requestWillBeSent") {
			this.requests.push((params as { request: { url: string } }).request.url);
		} else if (method === "Runtime.exceptionThrown" || method === "Log.entryAdded") {
			this.complaints.push(JSON.stringify(params));
		} else if (method === "Runtime.consoleAPICalled") {
			this.complaints.push(JSON.stringify(params?.args));
		}
	}

	async [Symbol.asyncDispose](): Promise<void> {
		try {
			process.kill(-(this.#child.pid as number), "SIGKILL");
		} catch {
			// It has ended, or never began.
		}
		await this.#ended;
		rmSync(this.#home, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 });
	}
}
