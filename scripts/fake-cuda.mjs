// `node scripts/fake-cuda.mjs [--without NAME,…]` builds the fake CUDA driver as libcuda.so.1 and libcuda.so into
// target/fake-cuda, and prints that folder, for LD_LIBRARY_PATH. `--without` makes a copy that does not export
// those functions, as an older driver does not, in a folder of its own.

import { mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { fail, requireRust, root, run } from "./setup.mjs";

/** Where it lies, whole. */
export const fakeCudaRoot = join(root, "target", "fake-cuda");

/**
 * Builds it, and returns the folder.
 *
 * @param {string[]} without Names of exports to leave out.
 */
export function buildFakeCuda(without = []) {
	run("cargo", ["build", "--package", "fake-cuda", "--locked", "--quiet"]);
	const library = readFileSync(join(root, "target", "debug", "libfake_cuda.so"));
	for (const name of without) {
		strike(library, name);
	}
	const folder = [fakeCudaRoot, ...without].join("-without-");
	mkdirSync(folder, { recursive: true });
	for (const name of ["libcuda.so.1", "libcuda.so"]) {
		// In one go: processes that have it loaded keep the one that they have.
		const written = join(folder, `${name}.${process.pid}`);
		writeFileSync(written, library);
		renameSync(written, join(folder, name));
	}
	return folder;
}

/** Spoils a name in the tables of symbols: dlsym looks under its hash, and finds another name there. */
function strike(/** @type {Buffer} */ library, /** @type {string} */ name) {
	const entry = Buffer.from(`\0${name}\0`);
	let at = library.indexOf(entry);
	if (at < 0) {
		fail(`the fake driver does not export ${name}`);
	}
	for (; at >= 0; at = library.indexOf(entry, at)) {
		library[at + 1] = "x".charCodeAt(0);
	}
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	const { values } = parseArgs({ options: { without: { type: "string", default: "" } } });
	requireRust();
	console.log(buildFakeCuda(values.without.split(",").filter(Boolean)));
}
