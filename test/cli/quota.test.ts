import { expect, it } from "vitest";
import { table } from "../../ts/cli/quota.js";

it.each([
	[0, "each of 0 others"],
	[1, "the 1 other"],
	[2, "each of 2 others"],
])("the table's last row has %i tenants without a quota of their own", (tenants, name) => {
	const held = { used_bytes: 4096, objects: 1, evicted_bytes: 0 };
	const text = table({
		memory_bytes: 2 ** 30,
		persistent: true,
		default: { cap: null, guarantee: 0 },
		tenants: { acme: { cap: 2 ** 20, guarantee: 0, ...held } },
		unnamed: { tenants, ...held },
	});
	expect(text).toMatch(new RegExp(`^${name} +none +0 B +4 KiB`, "m"));
});
