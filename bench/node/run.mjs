// `npm run bench -- NAME [PART …] [--json]`: builds, then runs bench/node/NAME.mjs, whose default export
// resolves to rows, of the parts named only where it has parts. They go to stdout, as a table or as one JSON array; all else goes to stderr.

import { existsSync } from "node:fs";
import { parseArgs } from "node:util";
import { fail, run, setup, step } from "../../scripts/setup.mjs";

const { values, positionals } = parseArgs({
	allowPositionals: true,
	options: { json: { type: "boolean", default: false } },
});
const [name, ...parts] = positionals;
const file = new URL(`./${name}.mjs`, import.meta.url);
if (name === undefined || !/^[\w-]+$/.test(name) || !existsSync(file)) {
	fail("usage: npm run bench -- NAME [PART …] [--json], where bench/node/NAME.mjs is a benchmark");
}
setup();
run(process.execPath, ["scripts/build.mjs"], { stdio: ["inherit", 2, "inherit"] });
step(`bench ${name}`);
/** @type {import("./rows.mjs").Row[]} */
const rows = await (await import(file.href)).default(...parts);
if (values.json) {
	console.log(JSON.stringify(rows, null, 2));
} else {
	console.table(
		rows.map(({ name, ours, reference, unit, ratio }) => ({
			name,
			ours: `${figure(ours)} ${unit}`,
			reference: `${figure(reference)} ${unit}`,
			ratio: Number(ratio.toFixed(3)),
		})),
	);
}

/** A figure with three digits at least. */
function figure(/** @type {number} */ value) {
	return value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 2 : 0 });
}
