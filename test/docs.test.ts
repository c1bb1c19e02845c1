// The code in the guides, run as it stands there.

import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";

const root = fileURLToPath(new URL("..", import.meta.url));

describe("docs", () => {
	it("link to nothing that the package has not", () => {
		const { files } = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));
		const shipped = (path: string) =>
			files.some((file: string) => path === file || path.startsWith(`${file}/`)) &&
			!path.startsWith("docs/api");
		const guides = readdirSync(join(root, "docs")).map((name) => `docs/${name}`);
		const lost = [...guides, ...files]
			.filter((file: string) => file.endsWith(".md"))
			.flatMap((file: string) => {
				const text = readFileSync(join(root, file), "utf8");
				return [...text.matchAll(/\]\((?!https?:|#)([^)#\s]+)/g)].map(([, link = ""]) => ({
					file,
					link,
					path: join(dirname(file), link).replace(/\/$/, ""),
				}));
			})
			.filter(({ path }) => !shipped(path) || !existsSync(join(root, path)));
		expect(lost).toEqual([]);
	});

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
