"use strict";
const form = document.body.dataset.form, storageKey = "dynkp-judge-" + form;
const annotator = document.querySelector("#annotator"), progress = document.querySelector("#progress");
const sections = [...document.querySelectorAll("section")];

// The id is JSON, because HTML replaces some control characters in attributes.
function postId(section) {
  return JSON.parse(section.dataset.post);
}

function ranks(section) {
  const ranks = {};
  for (const select of section.querySelectorAll("select")) {
    const { criterion, label } = select.dataset;
    if (select.value) (ranks[criterion] ??= {})[label] = Number(select.value);
  }
  return ranks;
}

function isComplete(section) {
  return [...section.querySelectorAll("select")].every((select) => select.value);
}

function answers() {
  const posts = sections.map((section) => ({ id: postId(section), ranks: ranks(section), complete: isComplete(section) }));
  return { form, annotator: annotator.value.trim(), answers: posts };
}

function showProgress() {
  const complete = sections.filter(isComplete).length;
  sections.forEach((section) => section.classList.toggle("done", isComplete(section)));
  progress.textContent = `${complete} of ${sections.length} posts ranked`;
}

function save() {
  showProgress();
  try {
    localStorage.setItem(storageKey, JSON.stringify(answers()));
  } catch {
    progress.textContent += "; this browser stores nothing: export before you close the page";
  }
}

function restore() {
  let saved = null;
  try { saved = JSON.parse(localStorage.getItem(storageKey)); } catch { return; }
  if (!saved) return;
  annotator.value = saved.annotator;
  const byPost = new Map(saved.answers.map((answer) => [answer.id, answer.ranks]));
  for (const section of sections)
    for (const select of section.querySelectorAll("select"))
      select.value = byPost.get(postId(section))?.[select.dataset.criterion]?.[select.dataset.label] ?? "";
}

document.addEventListener("input", save);
document.querySelector("#export").addEventListener("click", () => {
  if (!annotator.reportValidity()) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(answers(), null, 1)], { type: "application/json" }));
  link.download = `answers-${annotator.value.trim().replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
});
restore();
showProgress();
