import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

/** Whether the machine has redis-server and redis-cli; where not, a line says what is left out. */
export function hasRedis(): boolean {
	const missing = ["redis-server", "redis-cli"].filter(
		(program) => spawnSync(program, ["--version"]).status !== 0,
	);
	if (missing.length > 0) {
		process.stderr.write(
			`SKIPPED the remote tier with Redis: no ${missing.join(", no ")} (Debian: apt-get install redis-server)\n`,
		);
	}
	return missing.length === 0;
}

/** A port that nobody listens on just now. */
export async function freePort(): Promise<number> {
	const server = createServer().listen(0, "127.0.0.1");
	await once(server, "listening");
	const { port } = server.address() as { port: number };
	server.close();
	await once(server, "close");
	return port;
}

/** A `redis-server` of its own, whose data outlive a kill. */
export class RedisProcess implements AsyncDisposable {
	readonly port: number;
	readonly #args: string[];
	readonly #directory: string;
	#process: ChildProcess | undefined;

	private constructor(port: number, args: string[]) {
		this.port = port;
		this.#args = args;
		this.#directory = mkdtempSync(join(tmpdir(), "kvferry-redis-"));
	}

	/** Starts one and waits until it listens. */
	static async start(...args: string[]): Promise<RedisProcess> {
		const redis = await RedisProcess.prepare(...args);
		await redis.start();
		return redis;
	}

	/** One that is not started yet. */
	static async prepare(...args: string[]): Promise<RedisProcess> {
		return new RedisProcess(await freePort(), args);
	}

	/** Starts it, or starts it again. */
	async start(): Promise<void> {
		const child = spawn(
			"redis-server",
			[
				...["--port", String(this.port), "--bind", "127.0.0.1", "--dir", this.#directory],
				...["--save", "", "--appendonly", "yes", "--appendfsync", "no", ...this.#args],
			],
			{ stdio: ["ignore", "pipe", "inherit"] },
		);
		this.#process = child;
		const exited = once(child, "exit").then(([code]) => {
			throw new Error(`redis-server ended with ${code}`);
		});
		const ready = (async () => {
			for await (const line of createInterface({ input: child.stdout as NodeJS.ReadableStream })) {
				if (/Ready to accept connections/.test(line)) {
					break;
				}
			}
			child.stdout?.resume();
		})();
		await Promise.race([ready, exited]);
		exited.catch(() => {}); // it is meant to end some time
	}

	/** Ends it with SIGKILL and waits until it is gone. */
	async kill(): Promise<void> {
		const child = this.#process;
		this.#process = undefined;
		if (child !== undefined) {
			const exited = child.exitCode === null ? once(child, "exit") : undefined;
			child.kill("SIGKILL");
			await exited;
		}
	}

	/** Sends a signal without waiting for anything. */
	signal(signal: NodeJS.Signals): void {
		this.#process?.kill(signal);
	}

	/** What redis-cli prints for a command. */
	cli(...args: string[]): string {
		const { status, stdout, stderr } = spawnSync(
			"redis-cli",
			["-h", "127.0.0.1", "-p", String(this.port), ...args],
			{ encoding: "utf8", timeout: 20_000 },
		);
		if (status !== 0) {
			throw new Error(`redis-cli ${args.join(" ")}: ${stderr}`);
		}
		return stdout.trim();
	}

	async [Symbol.asyncDispose](): Promise<void> {
		await this.kill();
		rmSync(this.#directory, { recursive: true, force: true });
	}
}
