// The code in the guides, run as it stands there.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";

const root = fileURLToPath(new URL("..", import.meta.url));

describe("docs", () => {
	it.each(["paged-engines.md", "prefix-cache.md"])(
		"have an engine that does what the guide says: %s",
		(name) => {
			const guide = readFileSync(join(root, "docs", name), "utf8");
			const [, code = "", output = ""] =
				/```js\n([\s\S]*?)```\n\n```text\n([\s\S]*?)```/.exec(guide) ?? [];
			const home = mkdtempSync(join(root, "target", "guide-")); // inside, so that "kvferry" is this package
			try {
				writeFileSync(join(home, "engine.mjs"), code);
				const printed = execFileSync(process.execPath, [join(home, "engine.mjs")], {
					encoding: "utf8",
				});
				expect(printed).toBe(output);
				expect(printed).not.toBe("");
			} finally {
				rmSync(home, { recursive: true, force: true });
			}
		},
		60_000,
	);
});
