// Grids by step: the slider shows one of them and marks its step in the charts. `data` is what is said of each, and where it lies.
if ($("step")) {
  const sheets = all(".sheet");
  const choose = () => {
    const at = Number($("step").value);
    sheets.forEach((sheet, n) => { sheet.hidden = n !== at; });
    $("chosen").textContent = data[at].about;
    $("step").setAttribute("aria-valuetext", data[at].about);
    all(".mark.chosen").forEach((mark) => { mark.style.left = `${data[at].position}%`; });
  };
  $("step").addEventListener("input", choose);
  $("step").value = sheets.length - 1;
  choose();
}
