import { createHash } from "node:crypto";
import { mkdir, open, readFile, rename, stat, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { isAbsolute, join } from "node:path";
import { KvferryError } from "../errors.js";
import { throwIfAborted } from "../waiting.js";

/** A file as it was when it was hashed. */
interface Remembered {
	readonly size: string;
	readonly mtimeNs: string;
	/** What unpacks or copies a file may set the other time back; this one nobody sets. */
	readonly ctimeNs: string;
	readonly sha256: string;
}

/**
 * SHA-256 of a file, 64 hexadecimal digits. Computed once and remembered, by device, inode, size and
 * time of change, in `$XDG_CACHE_HOME/kvferry` (`~/.cache/kvferry`).
 *
 * @throws {@link KvferryError} `SYSTEM` when the file cannot be read, `ABORTED`.
 */
export async function fileSha256(path: string, signal?: AbortSignal): Promise<string> {
	try {
		const before = await asItIs(path);
		const known = await recall(before.memory);
		if (known !== undefined && isSame(known, before)) {
			return known.sha256;
		}
		const sha256 = await hashFile(path, signal);
		const { memory, ...after } = await asItIs(path);
		if (memory === before.memory && isSame(after, before)) {
			await remember(memory, { ...after, sha256 });
		}
		return sha256;
	} catch (error) {
		throwIfAborted(signal);
		throw new KvferryError("SYSTEM", `Hashing the model ${path}: ${(error as Error).message}`, {
			cause: error,
		});
	}
}

type Version = Omit<Remembered, "sha256">;

/** What tells that a file was not changed, and where its hash is remembered. */
async function asItIs(path: string): Promise<Version & { readonly memory: string }> {
	const { dev, ino, size, mtimeNs, ctimeNs } = await stat(path, { bigint: true });
	return {
		memory: join(cacheDirectory(), `sha256-${dev}-${ino}.json`),
		size: String(size),
		mtimeNs: String(mtimeNs),
		ctimeNs: String(ctimeNs),
	};
}

function isSame(a: Version, b: Version): boolean {
	return a.size === b.size && a.mtimeNs === b.mtimeNs && a.ctimeNs === b.ctimeNs;
}

async function hashFile(path: string, signal: AbortSignal | undefined): Promise<string> {
	const hash = createHash("sha256");
	await using file = await open(path);
	for await (const piece of file.createReadStream({ highWaterMark: 1 << 20, autoClose: false })) {
		throwIfAborted(signal); // a model may take minutes
		hash.update(piece);
	}
	return hash.digest("hex");
}

function cacheDirectory(): string {
	const { XDG_CACHE_HOME: configured } = process.env;
	// The specification has relative paths ignored.
	const base = configured !== undefined && isAbsolute(configured) ? configured : undefined;
	return join(base ?? join(homedir(), ".cache"), "kvferry");
}

async function recall(path: string): Promise<Remembered | undefined> {
	try {
		const value = JSON.parse(await readFile(path, "utf8"));
		return /^[0-9a-f]{64}$/.test(value.sha256) ? value : undefined;
	} catch {
		return undefined; // not there, or not ours: the file is hashed again
	}
}

/** Does its best: a home that cannot be written to costs time, no correctness. */
async function remember(path: string, value: Remembered): Promise<void> {
	const partial = `${path}.${process.pid}`;
	try {
		await mkdir(cacheDirectory(), { recursive: true, mode: 0o700 });
		await writeFile(partial, JSON.stringify(value), { mode: 0o600 });
		await rename(partial, path);
	} catch {
		return;
	}
}

/** JSON with sorted keys, so that equal values give equal text. */
export function canonicalJson(value: unknown): string {
	return JSON.stringify(value, (_key, item: unknown) => {
		if (typeof item === "bigint") {
			return `${item}n`;
		}
		if (typeof item === "object" && item !== null && !Array.isArray(item)) {
			return Object.fromEntries(Object.entries(item).sort(([a], [b]) => (a < b ? -1 : 1)));
		}
		return item;
	});
}
