// Before anything is painted: light or dark, as it was chosen here last. Without a choice, as the system has it.
"use strict";
{
  const chosen = localStorage.getItem("mpypi-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
