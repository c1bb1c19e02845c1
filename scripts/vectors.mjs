// `npm run vectors -- DIR`: runs the oracle vectors of DIR through the built package and prints a
// line for each file, then the sum.

import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { buildAddon, buildJavaScript } from "./build.mjs";
import { setup } from "./setup.mjs";
import { EXCUSED, UNREACHABLE } from "./vectors/outcome.mjs";

/** @typedef {import("./vectors/outcome.mjs").Schema} Schema */
/** What a file's cases come to. @typedef {{ passed: number, failed: number, unreachable: number, excused: Map<string, number> }} Sum */

const dir = process.argv[2];
if (dir === undefined) {
	console.error("usage: npm run vectors -- DIR");
	process.exit(2);
}
setup();
buildAddon();
buildJavaScript();
/** @type {typeof import("../ts/index.js")} */
const kvferry = await import(new URL("../dist/index.js", import.meta.url).href);

const home = new URL("./vectors/", import.meta.url);
/** One file of checks for each concept. @type {Schema[]} */
const schemas = [];
for (const name of readdirSync(home).sort()) {
	if (name !== "outcome.mjs") {
		schemas.push((await import(new URL(name, home).href)).default);
	}
}

/** @type {Sum} */
const total = { passed: 0, failed: 0, unreachable: 0, excused: new Map() };
for (const file of readdirSync(dir).sort()) {
	const data = file.endsWith(".json") ? parse(readFileSync(join(dir, file), "utf8")) : undefined;
	const sections = schemas.map((schema) => schema(data, kvferry)).find((found) => found);
	if (sections === undefined) {
		console.log(`${file}: not run, no schema that this version knows`);
		continue;
	}
	const sum = run(file, sections);
	const rest = sum.unreachable > 0 ? `, ${sum.unreachable} that no request can have` : "";
	console.log(`${file}: ${sum.passed} passed, ${sum.failed} failed${rest}`);
	for (const [defect, cases] of sum.excused) {
		console.log(`${file}: ${cases} of them show a defect of the original: ${defect}`);
	}
	total.passed += sum.passed;
	total.failed += sum.failed;
}
console.log(`${total.passed} passed, ${total.failed} failed`);
process.exitCode = total.failed > 0 ? 1 : 0;

/** JSON whose integers beyond 2^53 become strings, where JSON.parse would round them. */
function parse(/** @type {string} */ text) {
	const quoted = text.replace(/"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g, (token) =>
		/^-?\d+$/.test(token) && !Number.isSafeInteger(Number(token)) ? `"${token}"` : token,
	);
	return JSON.parse(quoted);
}

function run(
	/** @type {string} */ file,
	/** @type {import("./vectors/outcome.mjs").Section[]} */ sections,
) {
	/** @type {Sum} */
	const sum = { passed: 0, failed: 0, unreachable: 0, excused: new Map() };
	for (const [section, items, check] of sections) {
		for (const [index, item] of items.entries()) {
			let outcome;
			let reason = "another result";
			try {
				outcome = check(item);
			} catch (error) {
				outcome = false;
				reason = String(error);
			}
			if (outcome === UNREACHABLE) {
				sum.unreachable++;
			} else if (typeof outcome === "object") {
				sum.passed++;
				const { [EXCUSED]: defect } = outcome;
				sum.excused.set(defect, (sum.excused.get(defect) ?? 0) + 1);
			} else if (outcome) {
				sum.passed++;
			} else {
				sum.failed++;
				console.log(`${file}: ${section} ${item.id ?? index}: ${reason}`);
			}
		}
	}
	return sum;
}
