// Writes LICENSES.txt: name, version and license text of each package that the bundle holds, and the bundle's SHA-256.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";

const inputs = Object.keys(Object.values(JSON.parse(readFileSync("meta.json")).outputs)[0].inputs);
const folders = [...new Set(inputs.filter((file) => file.startsWith("node_modules/")).map((file) => file.split("/").slice(0, 2).join("/")))].sort();
const texts = new Map();
for (const folder of folders) {
  const { name, version, license } = JSON.parse(readFileSync(`${folder}/package.json`));
  const file = readdirSync(folder).find((one) => /^licen[sc]e/i.test(one));
  const text = file ? readFileSync(`${folder}/${file}`, "utf8").trim() : `License: ${license}`;
  texts.set(text, [...(texts.get(text) ?? []), `${name} ${version} (${license})`]);
}
const digest = createHash("sha256").update(readFileSync("vega.min.js")).digest("hex");
const parts = [...texts].map(([text, names]) => `${names.join("\n")}\n\n${text}\n`);
writeFileSync("LICENSES.txt", `vega.min.js (SHA-256 ${digest}) holds these packages.\n\n${parts.join(`\n${"-".repeat(80)}\n\n`)}`);
